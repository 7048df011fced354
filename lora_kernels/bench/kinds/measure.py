"""The measurements of the suite `kinds`: they fill its document, cell after cell."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.bench.kinds.cells import FROZEN, OURS, TIME, Cell, Target, Way
from lora_kernels.bench.record import METHOD, Setting
from lora_kernels.testing import documents, timing
from lora_kernels.testing.watch import first_line

Advance = Callable[[str, int], None]


def begin(setting: Setting) -> dict[str, Any]:
    """Return the document of a run that has not measured anything."""
    return documents.begin(setting.device, ("torch", "peft", "transformers", "bitsandbytes"), setting.command) | {
        "suite": setting.suite,
        "method": METHOD,
        "rounds": setting.rounds,
        "notes": [],
        "cells": {},
        "gate": [],
        "timings": [],
        "noise": [],
    }


def measure(document: dict[str, Any], cells: Sequence[Cell], setting: Setting, advance: Advance) -> None:
    """Judge and time every way in each of `cells`. A way that is wrong in a cell gets no number there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about its own settings
        for cell in cells:
            _measure(document, cell, setting, advance)


def key(cell: Cell) -> str:
    """Return the name of a cell within a run."""
    dtype = "" if cell.dtype == torch.float32 else f", {str(cell.dtype).removeprefix('torch.')}"
    return f"{cell.kind}: {cell.name}{dtype}"


def _measure(document: dict[str, Any], cell: Cell, setting: Setting, advance: Advance) -> None:
    name = key(cell)
    advance(f"{name}: checking the numbers", 0)
    try:
        found = cell.ways()
    except ImportError as error:  # a package that the cell compares with
        document["notes"].append(f"{name}: not measured: {first_line(error)}")
        return
    steps: dict[str, list[timing.Step]] = {}
    for way, each in found.items():
        faults = _faults(each)
        document["gate"].append({"cell": name, "way": way, "green": not faults, "faults": faults})
        if not faults:
            steps[way] = [_step(cell, each)]
    if FROZEN not in steps:
        document["notes"].append(f"{name}: not measured: the frozen layer does not run")
        return
    document["cells"][name] = {
        "kind": cell.kind,
        "name": cell.name,
        "backward": cell.backward,
        "dtype": str(cell.dtype).removeprefix("torch."),
    }
    saved = {way: saved_bytes(found[way]) for way in steps} if cell.backward else {}
    taken = timing.interleave(FROZEN, steps, setting.rounds, timing.CpuTimer(), functools.partial(advance, name, 1))
    document["noise"].append({"cell": name, "ratio": timing.quartiles(taken.noise())})
    for way in steps:
        entry: dict[str, Any] = {
            "cell": name,
            "way": way,
            "seconds": timing.quartiles(taken.seconds(way)),
            "ratio": timing.quartiles(taken.ratios(way, FROZEN)),
            "saved": saved.get(way),
        }
        if way == OURS:
            entry["targets"] = [_held_to(target, taken, saved) for target in cell.targets if target.to in steps]
        document["timings"].append(entry)


def _faults(way: Way) -> list[str]:
    if way.faults is None:
        return []
    try:
        return way.faults()
    except Exception as error:  # a way may fail in any way, and each is a fault
        return [f"{type(error).__name__}: {first_line(error)}"]


def _step(cell: Cell, way: Way) -> timing.Step:
    """Return one forward, or one forward and backward, of a way."""
    if not cell.backward:

        def forward() -> None:
            with torch.no_grad():
                way.forward()

        return forward
    y = way.forward()
    dy = torch.randn_like(y, requires_grad=False)
    trained = [t for t in way.trained if t.requires_grad]

    def both() -> None:
        y = way.forward()
        if y.requires_grad:
            torch.autograd.grad(y, trained, dy, allow_unused=True)

    return both


def saved_bytes(way: Way) -> int:
    """Return the bytes of all storages that autograd holds after a forward, each counted once, x included. Parameters
    are not counted."""
    parameters = {t.untyped_storage().data_ptr() for t in (*way.trained, *way.frozen) if isinstance(t, nn.Parameter)}
    parameters |= {t.untyped_storage().data_ptr() for t in way.frozen}
    kept: dict[int, Tensor] = {}  # the tensors are kept, so that no address is used again

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = way.forward()
    total = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)
    del y
    return total


def _held_to(target: Target, taken: timing.Rounds, saved: dict[str, int]) -> dict[str, Any]:
    """Return a target, what ours reached, and whether it is met."""
    if target.what == TIME:
        value = timing.quartiles(taken.ratios(OURS, target.to))[1]
    else:
        value = saved[OURS] / max(saved[target.to], 1)
    return {**target._asdict(), "value": value, "met": round(value, 2) <= target.most}
