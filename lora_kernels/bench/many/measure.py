"""The measurements of the suite `many`: they fill its document, cell after cell."""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_kernels.backends import dispatch
from lora_kernels.bench.many import pool
from lora_kernels.bench.many.cells import FROZEN, OURS, Batch, Cell, Target, batch
from lora_kernels.bench.many.judged import Judge
from lora_kernels.bench.many.methods import methods
from lora_kernels.bench.record import METHOD, Setting
from lora_kernels.core.operands import Adapter, Base, call_of_multi
from lora_kernels.core.rows import Rows
from lora_kernels.testing import documents, timing

Advance = Callable[[str, int], None]


def begin(setting: Setting) -> dict[str, Any]:
    """Return the document of a run that has not measured anything."""
    return documents.begin(setting.device, ("torch", "peft"), setting.command) | {
        "suite": setting.suite,
        "method": METHOD,
        "rounds": setting.rounds,
        "notes": [],
        "cells": {},
        "gate": [],
        "timings": [],
        "noise": [],
        "calls": [],
    }


def measure(document: dict[str, Any], cells: Sequence[Cell], setting: Setting, advance: Advance) -> None:
    """Judge and time every method in each of `cells`. A method that is wrong in a cell gets no number there."""
    advance("calls and bytes of a pool", 0)
    width = max(cell.width for cell in cells)
    document["calls"] = [_making_rows(setting.rounds), *pool.measure_pool(setting.rounds, width)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no kernel is chosen")  # the document names the back-ends
        for cell in cells:
            _measure(document, cell, setting, advance)


def _measure(document: dict[str, Any], cell: Cell, setting: Setting, advance: Advance) -> None:
    advance(f"{cell.name}: checking the numbers", 0)
    q = batch(cell)
    found, notes = methods(cell, setting.backend)
    document["notes"] += [note for note in notes if note not in document["notes"]]
    judge, right = Judge(q), []
    for method in found:
        faults = judge.faults(method)
        document["gate"].append({"cell": cell.name, "method": method.name, "green": not faults, "faults": faults})
        if not faults:
            right.append(method)
    document["cells"][cell.name] = cell.entry() | {"backend": _backend(q, setting.backend)}
    drawn = replace(q, seeds=(None,) * cell.n)
    steps: dict[str, list[timing.Step]] = {method.name: [method.build(drawn)] for method in right}
    taken = timing.interleave(
        FROZEN, steps, setting.rounds, timing.CpuTimer(), functools.partial(advance, cell.name, 1)
    )
    document["noise"].append({"cell": cell.name, "ratio": timing.quartiles(taken.noise())})
    for name in steps:
        entry = {
            "cell": cell.name,
            "method": name,
            "seconds": timing.quartiles(taken.seconds(name)),
            "ratio": timing.quartiles(taken.ratios(name, FROZEN)),
            "repeats": taken.repeats[name],
        }
        if name == OURS:
            aims = [target for target in cell.targets if target.to in steps]
            entry["targets"] = [_held_to(target, taken) for target in aims]
        document["timings"].append(entry)


def _held_to(target: Target, taken: timing.Rounds) -> dict[str, Any]:
    """Return a target, what ours reached within the rounds, and whether it is met."""
    values = taken.ratios(OURS, target.to)
    if target.over:
        ours, base = (taken.ratios(name, FROZEN) for name in (OURS, target.to))
        values = [u - v for u, v in zip(ours, base, strict=True)]
    spread = timing.quartiles(values)
    met = round(spread[1], 2) <= target.most
    return {"to": target.to, "most": target.most, "over": target.over, "value": spread, "met": met}


def _backend(q: Batch, named: str | None) -> str:
    """Return the back-ends that serve our method in a cell: that of the forward, and in training that of the backward
    where it is another one. "none" where a named back-end refuses the call."""
    base = Base(q.w)
    own = [Adapter(*each, q.cell.p) for each in zip(q.a, q.b, q.scales, strict=True)]
    passes = (("forward_multi", q.x), ("backward_multi", q.dy))[: 2 if q.cell.training else 1]
    try:
        names = [str(dispatch.pick(call_of_multi(op, rows, base, own), named).name) for op, rows in passes]
    except ValueError:
        return "none"
    return ", ".join(dict.fromkeys(names))


def _making_rows(rounds: int) -> dict[str, Any]:
    """Return the time of `Rows.by_id`, which a forward of a model calls once for all of its layers."""
    ids = torch.arange(64) % 8
    taken = [timing.CpuTimer().sample([lambda: Rows.by_id(ids, 8)], 200) for _ in range(rounds)]
    microseconds = 1e6 * statistics.median(taken)
    return {"what": "Rows.by_id of 64 rows beside 8 adapters", "value": microseconds, "unit": "µs", "most": None}
