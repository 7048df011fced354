"""The measurements of a run: they fill the document of a `Record`, shape after shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lora_kernels.bench import layers, overhead, peers, roofline
from lora_kernels.bench.memory import peak_bytes, saved_bytes
from lora_kernels.bench.record import Record, Setting
from lora_kernels.bench.shapes import BACKWARD, GRAPH, Cell, Shape
from lora_kernels.bench.variants import FLOOR, PEFT, Variant, ours
from lora_kernels.testing import timing
from lora_kernels.testing.judge import Judge
from lora_kernels.testing.names import SHORT
from lora_kernels.testing.watch import answers, first_line

Advance = Callable[[str, int], None]


class Failed(RuntimeError):
    """The device no longer answers."""


class Bench:
    """Measures shape after shape into the document of `record`."""

    def __init__(self, setting: Setting, record: Record) -> None:
        self.setting, self.record, self.device = setting, record, setting.device
        self.timer = timing.timer_for(setting.device)

    @property
    def document(self) -> dict[str, Any]:
        """The document of the run."""
        return self.record.document

    def steps(self, shapes: list[Shape]) -> int:
        """Return the number of steps that `measure` will report for all of `shapes`."""
        return self.setting.rounds * sum(len(self._cells(shape)) for shape in shapes)

    def measure_rates(self, shapes: list[Shape]) -> None:
        """Measure the rates of the device's own GEMM and copy, once for the run."""
        self.document["roofline"] = roofline.measure_rates(self.device, [shape.dtype for shape in shapes])

    def measure(self, shape: Shape, advance: Advance) -> None:
        """Judge, time and count the bytes of every variant on one shape."""
        self.record.tell(Cell(shape, 0.0, "choice"), FLOOR.name)
        variants, passed_over = ours(shape, self.device, self.setting.backend, self.setting.without)
        for variant in [v for v in variants if self.record.struck(shape, v)]:
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
        for p in dict.fromkeys(cell.p for cell in shape.cells):
            advance(f"{shape.name} p={p:g}: checking the numbers", 0)
            timed = [FLOOR, *self._comparable(Cell(shape, p, "check"), variants)]
            for cell in self._cells(shape):
                if cell.p == p:
                    self._time(cell, timed, advance)
            if shape.training:
                cell = Cell(shape, p, "bytes")
                self.record.tell(cell, FLOOR.name)
                self._count_bytes(cell, [v for v in timed if v is not FLOOR and v.counted])

    def measure_calls(self, imports: int) -> None:
        """Measure what calls and the import cost beside the kernels; the import in `imports` fresh interpreters."""
        rounds = max(self.setting.rounds, 5)
        automatic = {entry["backend"] for entry in self.document["timings"] if entry["automatic"]}
        for name in sorted(automatic):
            self.document["overhead"] += map(asdict, overhead.measure_overhead(self.device, name, rounds))
        if any(variant.name == PEFT.name for variant in self.setting.baselines):
            self.document["layer_calls"] += map(asdict, overhead.measure_layers(self.device, rounds))
        self.document["import"] = asdict(overhead.measure_import(imports))

    def _cells(self, shape: Shape) -> list[Cell]:
        graph = [Cell(shape, 0.0, GRAPH)] if self.device.type == "cuda" and not shape.training else []
        return [*shape.cells, *graph]

    def _comparable(self, check: Cell, variants: list[Variant]) -> list[Variant]:
        """Return the baselines that run, and those of our `variants` that are judged right. Every verdict goes on
        record."""
        shape, p, _ = check
        found = [v for v in self.setting.baselines if (v.dropout or p == 0) and v.wanted(shape)]
        found = [v for v in found if not self.record.struck(shape, v)]
        doubted = [v for v in found if v.doubted]
        if not variants and not doubted:
            return found
        self.record.tell(check, FLOOR.name)
        judge = Judge(shape.problem(p, self.device))
        right = []
        for variant in variants:
            self.record.tell(check, variant.name)
            verdicts, faults = judge.faults(str(variant.backend))
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
                right.append(variant)
        for variant in doubted:
            self.record.tell(check, variant.name)
            wrong = _faults(variant, judge)
            if wrong:
                self.document["notes"].append(f"{variant.name} is not measured on {shape.name} p={p:g}: {wrong}")
                found.remove(variant)
        return found + right

    def _time(self, cell: Cell, variants: list[Variant], advance: Advance) -> None:
        shape, p, which = cell
        bytes_per_set = shape.dtype.itemsize * (shape.N * shape.K + shape.M * (shape.K + 2 * shape.N))
        sets = [shape.problem(p, self.device, i) for i in range(timing.operand_sets(self.device, bytes_per_set))]
        steps: dict[str, list[timing.Step]] = {}
        timer = timing.GraphTimer() if which == GRAPH else self.timer
        for v in variants:
            self.record.tell(cell, v.name)
            steps[v.name] = [layers.step(v.build(q), q, which) for q in sets]
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
        rounds = timing.interleave(
            FLOOR.name,
            steps,
            self.setting.rounds,
            timer,
            lambda: advance(f"{shape.name} p={p:g}: {which}", 1),
            lambda name: self.record.tell(cell, name),
        )
        self.document["noise"].append(cell.entry() | {"ratio": timing.quartiles(rounds.noise())})
        self.document["timings"] += [self._timing(cell, v, rounds) for v in variants if v.name in steps]

    def _timing(self, cell: Cell, variant: Variant, rounds: timing.Rounds) -> dict[str, Any]:
        """Return the entry of one variant in a cell."""
        target = cell.shape.targets.get(cell.p) if variant.automatic and cell.which == BACKWARD else None
        beside_peft = variant.backend and PEFT.name in rounds.repeats
        return cell.entry() | {
            "variant": variant.name,
            "backend": variant.backend,
            "automatic": variant.automatic,
            "seconds": timing.quartiles(rounds.seconds(variant.name)),
            "ratio": timing.quartiles(rounds.ratios(variant.name, FLOOR.name)),
            "floor": self._floor(cell, variant),
            "rounds": len(rounds.seconds(variant.name)),
            "repeats": rounds.repeats[variant.name],
            "target": target,
            "over_peft": timing.quartiles(rounds.ratios(variant.name, PEFT.name)) if beside_peft else None,
        }

    def _floor(self, cell: Cell, variant: Variant) -> dict[str, Any] | None:
        rates = self.document["roofline"]
        return None if rates is None else roofline.floor(cell, rates, frozen=variant is FLOOR)._asdict()

    def _count_bytes(self, cell: Cell, variants: list[Variant]) -> None:
        shape, p, _ = cell
        q = shape.problem(p, self.device)
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


def _faults(variant: Variant, judge: Judge) -> str:
    """Return why a doubted variant cannot be compared with, or an empty string if it can. With dropout it draws a mask
    of its own, so its numbers are not judged: it only has to run."""
    q = judge.q
    try:
        got = layers.results(variant.build(q), q)
        return "" if q.p else "; ".join(peers.faults(got, judge.want))
    except Exception as error:  # it may fail in any way
        return f"{type(error).__name__}: {first_line(error)}"
