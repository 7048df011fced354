"""One run of the bench: fills the document that becomes the JSON."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from lora_kernels.bench import overhead, peers, roofline
from lora_kernels.bench.memory import peak_bytes, saved_bytes
from lora_kernels.bench.shapes import BACKWARD, GRAPH, Shape
from lora_kernels.bench.variants import FLOOR, PEFT, Variant, ours, step
from lora_kernels.testing import machine, timing
from lora_kernels.testing.judge import Judge, Problem, problem
from lora_kernels.testing.names import SHORT
from lora_kernels.testing.watch import answers, first_line

SCHEMA = 1
METHOD = (
    "Every number stands behind a check of values and gradients against fp64 in the same run. Variants are "
    "interleaved in rounds, in turning order; × is the median over rounds of time / time of the frozen layer "
    "(F.linear, backward to x only) in the same round, ± half its interquartile range; times are medians."
)
Advance = Callable[[str, int], None]


class Failed(RuntimeError):
    """The device no longer answers."""


STRIKES = 2
"""Failures after which a variant is measured on no further shape."""


class Bench:
    """Measures shape after shape into `document`."""

    def __init__(
        self,
        device: torch.device,
        rounds: int,
        command: str,
        baselines: tuple[list[Variant], list[str]],
        backend: str | None = None,
        without: Sequence[str] = (),
        suite: str | None = None,
    ) -> None:
        self.device, self.rounds, self.backend, self.without = device, rounds, backend, without
        self.doing: Callable[[str], None] = lambda what: None
        """Is told what runs now."""
        self.now: dict[str, Any] = {}
        """The same, as it goes into the document's "failed": shape, p, pass, variant."""
        self.timer = timing.timer_for(device)
        self.baselines, notes = baselines
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "commit": machine.commit(),
            "versions": machine.versions("torch", "triton", "peft"),
            "device": machine.describe_device(device),
            "method": METHOD,
            "rounds": rounds,
            "suite": suite,
            "roofline": None,
            "notes": list(notes),
            "failed": [],
            "shapes": {},
            "gate": [],
            "timings": [],
            "noise": [],
            "memory": [],
            "overhead": [],
            "layer_calls": [],
            "import": None,
        }

    def resume(self, document: dict[str, Any]) -> None:
        """Go on with what another process began. What that was measuring when it ended is measured anew, without the
        variant that ended it; where none is known to have, not at all."""
        self.document = document
        name = document.pop("measuring", None)
        if name is not None and not any(failure["shape"] == name for failure in document["failed"]):
            self.now = {"shape": name, "p": None, "pass": None, "variant": None}
            self.failed("the process ended while it was measured")
        elif name is not None:
            self._forget(name)

    def failed(self, why: str) -> None:
        """What runs now failed: it goes on record, and its shape has no numbers."""
        self.document["failed"].append(self.now | {"why": why})
        where = " ".join(str(self.now[key]) for key in ("variant", "pass") if self.now[key])
        p = "" if self.now["p"] is None else f" p={self.now['p']:g}"
        self.document["notes"].append(f"{self.now['shape']}{p}: {where + ': ' if where else ''}{why}")
        self._forget(self.now["shape"])

    def left_out(self, shape: Shape) -> bool:
        """Whether a shape is measured already, or cannot be: the frozen layer itself failed, or what did is unknown."""
        failures = [failure["variant"] for failure in self.document["failed"] if failure["shape"] == shape.name]
        return shape.name in self.document["shapes"] or None in failures or FLOOR.name in failures

    def _forget(self, name: str) -> None:
        self.document["shapes"].pop(name, None)
        for kind in ("gate", "timings", "noise", "memory"):
            self.document[kind] = [entry for entry in self.document[kind] if entry["shape"] != name]

    def _struck(self, shape: Shape, variant: Variant) -> bool:
        """Whether a variant failed on this shape, or on several."""
        failures = [each["shape"] for each in self.document["failed"] if each["variant"] == variant.name]
        return shape.name in failures or len(failures) >= STRIKES

    def _tell(self, shape: Shape, p: float, which: str, variant: str) -> None:
        self.now = {"shape": shape.name, "p": p, "pass": which, "variant": variant}
        self.doing(f"{shape.name} p={p:g}: {variant}, {which}")

    def steps(self, shapes: list[Shape]) -> int:
        """How many steps `measure` will report, for all of `shapes`."""
        return self.rounds * sum(len(self._cells(shape)) for shape in shapes)

    def measure_rates(self, shapes: list[Shape]) -> None:
        """What the device's own GEMM and copy reach: once, before the first shape."""
        self.document["roofline"] = roofline.measure_rates(self.device, [shape.dtype for shape in shapes])

    def measure(self, shape: Shape, advance: Advance) -> None:
        """Everything of one shape: gate, times, bytes."""
        self._tell(shape, 0.0, "choice", FLOOR.name)
        variants, passed_over = ours(shape, self.device, self.backend, self.without)
        for variant in [v for v in variants if self._struck(shape, v)]:
            passed_over[str(variant.backend)] = ["it failed before: see the notes"]
            variants.remove(variant)
        self.document["shapes"][shape.name] = {
            "M": shape.M,
            "N": shape.N,
            "K": shape.K,
            "R": shape.R,
            "dtype": SHORT[shape.dtype],
            "adapter_dtype": SHORT[shape.adapters],
            "bias": shape.bias,
            "size": shape.size,
            "passed_over": passed_over,
        }
        for p in dict.fromkeys(p for p, _ in shape.cells):
            advance(f"{shape.name} p={p:g}: checking the numbers", 0)
            candidates = [FLOOR, *self._comparable(shape, p, variants)]
            for which in (which for q, which in self._cells(shape) if q == p):
                self._time(shape, p, which, candidates, advance)
            if shape.training:
                self._tell(shape, p, "bytes", FLOOR.name)
                self._count_bytes(shape, p, [v for v in candidates if v is not FLOOR and v.counted])

    def measure_calls(self, imports: int) -> None:
        """What a call and an import cost beside the kernels."""
        automatic = {entry["backend"] for entry in self.document["timings"] if entry["automatic"]}
        for name in sorted(automatic):
            self.document["overhead"] += map(asdict, overhead.measure_overhead(self.device, name, max(self.rounds, 5)))
        if any(variant.name == PEFT.name for variant in self.baselines):
            self.document["layer_calls"] += map(asdict, overhead.measure_layers(self.device, max(self.rounds, 5)))
        self.document["import"] = asdict(overhead.measure_import(imports))

    def _cells(self, shape: Shape) -> list[tuple[float, str]]:
        graph = [(0.0, GRAPH)] if self.device.type == "cuda" and not shape.training else []
        return [*shape.cells, *graph]

    def _problem(self, shape: Shape, p: float, seed: int = 0) -> Problem:
        return problem(
            shape.M,
            shape.N,
            shape.K,
            shape.R,
            dtype=shape.dtype,
            adapter_dtype=shape.adapters,
            p=p,
            bias=shape.bias,
            seed=seed,
            device=self.device,
        )

    def _comparable(self, shape: Shape, p: float, variants: list[Variant]) -> list[Variant]:
        """Baselines that run, and of ours those whose numbers are right; every verdict goes on record."""
        found = [v for v in self.baselines if (v.dropout or p == 0) and v.wanted(shape)]
        found = [v for v in found if not self._struck(shape, v)]
        doubted = [v for v in found if v.doubted]
        if not variants and not doubted:
            return found
        self._tell(shape, p, "check", FLOOR.name)
        gate = Judge(self._problem(shape, p))
        green = []
        for variant in variants:
            self._tell(shape, p, "check", variant.name)
            verdicts, faults = gate.faults(str(variant.backend))
            if faults and not answers(self.device):
                raise Failed(faults[0])
            self.document["gate"].append(
                {
                    "shape": shape.name,
                    "p": p,
                    "backend": variant.backend,
                    "green": not faults,
                    "faults": faults,
                    "errors": [asdict(verdict) for verdict in verdicts],
                }
            )
            if not faults:
                green.append(variant)
        for variant in doubted:
            self._tell(shape, p, "check", variant.name)
            wrong = _faults(variant, gate)
            if wrong:
                self.document["notes"].append(f"{variant.name} is not measured on {shape.name} p={p:g}: {wrong}")
                found.remove(variant)
        return found + green

    def _time(self, shape: Shape, p: float, which: str, variants: list[Variant], advance: Advance) -> None:
        bytes_per_set = shape.dtype.itemsize * (shape.N * shape.K + shape.M * (shape.K + 2 * shape.N))
        sets = [self._problem(shape, p, seed) for seed in range(timing.operand_sets(self.device, bytes_per_set))]
        steps: dict[str, list[timing.Step]] = {}
        timer = timing.GraphTimer() if which == GRAPH else self.timer
        for v in variants:
            self._tell(shape, p, which, v.name)
            steps[v.name] = [step(v.build(q), q, which) for q in sets]
            if isinstance(timer, timing.GraphTimer):
                try:
                    timer.capture(steps[v.name])
                except RuntimeError as error:
                    if not answers(self.device):
                        raise
                    del steps[v.name]
                    self.document["notes"].append(
                        f"{v.name} is not measured on {shape.name} in a CUDA graph: {first_line(error)}"
                    )
        variants = [v for v in variants if v.name in steps]
        rounds = timing.interleave(
            FLOOR.name,
            steps,
            self.rounds,
            timer,
            lambda: advance(f"{shape.name} p={p:g}: {which}", 1),
            lambda name: self._tell(shape, p, which, name),
        )
        cell = {"shape": shape.name, "p": p, "pass": which}
        self.document["noise"].append(cell | {"ratio": timing.quartiles(rounds.noise())})
        for variant in variants:
            entry = cell | {
                "variant": variant.name,
                "backend": variant.backend,
                "automatic": variant.automatic,
                "seconds": timing.quartiles(rounds.seconds(variant.name)),
                "ratio": timing.quartiles(rounds.ratios(variant.name, FLOOR.name)),
                "floor": self._floor(shape, which, variant),
                "rounds": len(rounds.seconds(variant.name)),
                "repeats": rounds.repeats[variant.name],
                "target": shape.targets.get(p) if variant.automatic and which == BACKWARD else None,
                "over_peft": None,
            }
            if variant.backend and PEFT.name in steps:
                entry["over_peft"] = timing.quartiles(rounds.ratios(variant.name, PEFT.name))
            self.document["timings"].append(entry)

    def _floor(self, shape: Shape, which: str, variant: Variant) -> dict[str, Any] | None:
        rates = self.document["roofline"]
        return None if rates is None else roofline.floor(shape, which, rates, frozen=variant is FLOOR)._asdict()

    def _count_bytes(self, shape: Shape, p: float, variants: list[Variant]) -> None:
        q = self._problem(shape, p)
        for variant in variants:
            self.document["memory"].append(
                {
                    "shape": shape.name,
                    "p": p,
                    "variant": variant.name,
                    "backend": variant.backend,
                    "saved_bytes": saved_bytes(variant.build(q), q),
                    "saved_limit": shape.saved_limit,
                    "peak_bytes": peak_bytes(variant.build(q), q),
                }
            )


def _faults(variant: Variant, gate: Judge) -> str:
    """Why a doubted variant cannot be compared with; empty where it can. With dropout its mask is its own: that it runs
    is all that is asked."""
    q = gate.q
    try:
        task = variant.build(q)
        x = q.x.detach().requires_grad_()
        y = task.layer(x)
        gradients = torch.autograd.grad(y, (x, *task.trained), q.dy, allow_unused=True)
        if q.p:
            return ""
        results = dict(zip(("y", "dx", "da", "db"), (y.detach(), *gradients), strict=True))
        return "; ".join(peers.faults(results, gate.want))
    except Exception as error:  # it may fail in any way
        return f"{type(error).__name__}: {first_line(error)}"
