"""One run of the bench: fills the document that becomes the JSON."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from lora_kernels.bench import machine, overhead, peers, roofline, timing
from lora_kernels.bench.gate import Gate, Problem, problem
from lora_kernels.bench.memory import peak_bytes, saved_bytes
from lora_kernels.bench.shapes import BACKWARD, GRAPH, SHORT, Shape
from lora_kernels.bench.variants import FLOOR, PEFT, Variant, ours, step

SCHEMA = 1
METHOD = (
    "Every number stands behind a check of values and gradients against fp64 in the same run. Variants are "
    "interleaved in rounds, in turning order; × is the median over rounds of time / time of the frozen layer "
    "(F.linear, backward to x only) in the same round, ± half its interquartile range; times are medians."
)
Advance = Callable[[str, int], None]


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
            "shapes": {},
            "gate": [],
            "timings": [],
            "noise": [],
            "memory": [],
            "overhead": [],
            "layer_calls": [],
            "import": None,
        }

    def steps(self, shapes: list[Shape]) -> int:
        """How many steps `measure` will report, for all of `shapes`."""
        return self.rounds * sum(len(self._cells(shape)) for shape in shapes)

    def measure_rates(self, shapes: list[Shape]) -> None:
        """What the device's own GEMM and copy reach: once, before the first shape."""
        self.document["roofline"] = roofline.measure_rates(self.device, [shape.dtype for shape in shapes])

    def measure(self, shape: Shape, advance: Advance) -> None:
        """Everything of one shape: gate, times, bytes."""
        variants, passed_over = ours(shape, self.device, self.backend, self.without)
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
        doubted = [v for v in found if v.doubted]
        if not variants and not doubted:
            return found
        gate = Gate(self._problem(shape, p))
        green = []
        for variant in variants:
            verdicts, faults = gate.faults(str(variant.backend))
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
            wrong = _faults(variant, gate)
            if wrong:
                self.document["notes"].append(f"{variant.name} is not measured on {shape.name} p={p:g}: {wrong}")
                found.remove(variant)
        return found + green

    def _time(self, shape: Shape, p: float, which: str, variants: list[Variant], advance: Advance) -> None:
        bytes_per_set = shape.dtype.itemsize * (shape.N * shape.K + shape.M * (shape.K + 2 * shape.N))
        sets = [self._problem(shape, p, seed) for seed in range(timing.operand_sets(self.device, bytes_per_set))]
        steps = {v.name: [step(v.build(q), q, which) for q in sets] for v in variants}
        timer = self.timer
        if which == GRAPH:
            timer = graphs = timing.GraphTimer()
            for name in list(steps):
                try:
                    graphs.capture(steps[name])
                except RuntimeError as error:
                    del steps[name]
                    self.document["notes"].append(
                        f"{name} is not measured on {shape.name} in a CUDA graph: {_line(error)}"
                    )
            variants = [v for v in variants if v.name in steps]
        rounds = timing.interleave(
            FLOOR.name, steps, self.rounds, timer, lambda: advance(f"{shape.name} p={p:g}: {which}", 1)
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


def _faults(variant: Variant, gate: Gate) -> str:
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
        return f"{type(error).__name__}: {_line(error)}"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
