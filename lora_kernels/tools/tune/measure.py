"""How ``tune`` measures. Every candidate is judged as the bench judges, and must give the same bits twice; what fails
to compile, asks for more than the GPU has or is wrong is dropped. Those left are timed in turn; the fastest is kept.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lora_kernels.core import dropout as random
from lora_kernels.plans import quant_tiles
from lora_kernels.plans import store as tuned
from lora_kernels.plans.tiles import Plan
from lora_kernels.plans.tilings import Tiling
from lora_kernels.quant.weight import QuantizedWeight, quantize_weight
from lora_kernels.testing import judge, timing
from lora_kernels.testing.terminal import Terminal
from lora_kernels.testing.watch import Watch, answers, first_line
from lora_kernels.tools.tune.candidates import Size

ROUNDS = 9
GRAPH_ROWS = 1024
"""Calls of at most this M are timed in a CUDA graph: they may be shorter than Python needs to launch them."""


class DeviceLost(RuntimeError):
    """The GPU answers nothing any more, as after an illegal access."""


class Setting(NamedTuple):
    """What all calls that are measured have in common."""

    device: torch.device
    name: str
    """What the driver calls the device."""
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    p: float
    quant: str | None = None
    """The format of w; None: dense."""
    double_quant: bool = False

    @property
    def w_format(self) -> str:
        """As in `tiles.Case`."""
        return quant_tiles.w_format(self.quant, self.double_quant) if self.quant else ""


class Operands:
    """One set of operands of a pass, and room for its results."""

    def __init__(self, setting: Setting, size: Size, seed: int) -> None:
        M, K, N, R = size
        q = judge.problem(
            M, N, K, R, dtype=setting.dtype, adapter_dtype=setting.adapter_dtype, p=setting.p, bias=False, seed=seed,
            device=setting.device,
        )  # fmt: skip
        self.q = q
        self.w: Tensor | QuantizedWeight = q.w
        """As a pass is given it."""
        if setting.quant:
            self.w = quantize_weight(q.w, setting.quant, double_quant=setting.double_quant)
        # h as a forward saves it: what a backward is given.
        x = q.x.float() if q.seed is None else random.dropout(q.x.float(), q.p, q.seed)
        self.h = (x @ q.a.float().t()).to(q.x.dtype)
        self.results = self.room()

    @property
    def nbytes(self) -> int:
        """Of what a pass reads and writes."""
        return self.w.nbytes + self.q.x.nbytes + 2 * self.q.dy.nbytes

    def room(self) -> dict[str, Tensor]:
        """Room for what either pass writes. NaN: what is left of an earlier candidate's results must not pass for a
        result."""
        q = self.q
        like = {"y": q.dy, "h": self.h, "dx": q.x, "da": q.a, "db": q.b, "g": self.h}
        return {name: torch.full_like(t, torch.nan) for name, t in like.items()}


class Way(NamedTuple):
    """One way to run a pass, and the plan that stands for it where it is kept."""

    plan: Plan | Tiling
    run: Callable[[Operands, dict[str, Tensor]], None]
    """Reads the operands and writes, of `Operands.room`, y and h in a forward; dx, da, db and g in a backward."""


@dataclass(frozen=True)
class Work:
    """One pass of one size."""

    size: Size
    op: str
    """"forward" or "backward"."""
    key: str
    """What the fastest way is kept under."""
    ways: dict[str, Way]
    """By description; the first is what runs where nothing is kept."""


class Subject(Protocol):
    """What is measured: the ways of one back-end on one device."""

    setting: Setting

    def guard(self) -> AbstractContextManager[Any]:
        """Makes the device the current one."""

    def works(self, sizes: Sequence[Size]) -> list[Work]:
        """Both passes of every size."""

    def left_behind(self) -> str | None:
        """What the last run left where the next one would find it, in words; it is put right."""


class Tuner:
    """Measures work after work; `rows` are what is to be shown of it."""

    def __init__(self, subject: Subject, show: Terminal) -> None:
        self.subject, self.setting, self.show = subject, subject.setting, show
        self.rows: list[tuple[str, ...]] = []
        self.watch = Watch(None, show.line)

    def tune(self, sizes: Sequence[Size], keep: bool, seconds: float | None = None, stuck: float | None = None) -> bool:
        """Both passes of every size; what is found is kept, if it is to be, as soon as it is. No further pass is begun
        after `seconds`; where a candidate does not end within `stuck`, the process does. False where something could
        not be measured."""
        works = self.subject.works(sizes)
        complete, start = True, time.monotonic()
        self.watch = Watch(
            stuck, lambda what: self.show.line(f"✗ {what}: nothing more can be measured by this process")
        )
        with self.watch, self.show.progress(sum(len(work.ways) + ROUNDS for work in works)) as advance:
            for work in works:
                label = f"{work.size} {work.op}"
                if seconds is not None and time.monotonic() - start > seconds:
                    self.show.line(f"{label}: not measured, {seconds:g} s being spent")
                    complete = False
                    continue
                try:
                    best = self._measure(work, label, advance)
                except DeviceLost as error:
                    self.show.line(f"{label}: {error}: nothing more can be measured by this process")
                    return False
                except torch.OutOfMemoryError as error:
                    self.show.line(f"{label}: not measured: {first_line(error)}")
                    complete = False
                    continue
                if best is not None:
                    self.show.line(f"{label}: {', '.join(self.rows[-1][2:])}")
                if best is None:
                    self.show.line(f"{label}: no candidate is right")
                    complete = False
                elif keep:
                    complete &= self._keep(work, label, best)
        return complete

    def _keep(self, work: Work, label: str, best: str) -> bool:
        """In the file, except what runs anyway. False where it cannot be written."""
        plans = {key: plan for key, plan in tuned.load(self.setting.name).items() if key != work.key}
        if best != next(iter(work.ways)):
            plans[work.key] = work.ways[best].plan
        try:
            tuned.store(self.setting.name, plans)
        except OSError as error:
            self.show.line(f"{label}: not kept: {error} (XDG_CACHE_HOME names another cache directory)")
            return False
        return True

    def _measure(self, work: Work, label: str, advance: Any) -> str | None:
        """The fastest of those that are right; None where none is."""
        device = self.setting.device
        sets = [Operands(self.setting, work.size, 0)]
        count = timing.operand_sets(device, sets[0].nbytes)
        sets += [Operands(self.setting, work.size, seed) for seed in range(1, count)]
        q, w = sets[0].q, sets[0].w
        q, plain = (q, judge.evaluate(q)) if isinstance(w, Tensor) else judge.over_codes(q, w)
        want = judge.truth(q)
        steps: dict[str, list[timing.Step]] = {}
        timer = timing.timer_for(device)
        if device.type == "cuda" and work.size.M <= GRAPH_ROWS:
            timer = timing.GraphTimer()
        for name, way in work.ways.items():
            advance(f"{label}: checking", 1)
            self.watch(f"{label}: {name}")
            each: list[timing.Step] = [functools.partial(way.run, operands, operands.results) for operands in sets]
            fault = self._fault(work.op, way, sets[0], q, want, plain) or self._capture_fault(timer, each)
            if fault is None:
                steps[name] = each
            else:
                self.show.line(f"{label}: dropped {name}: {fault}")
        self.watch("")
        del q, w, want, plain
        if not steps:
            advance(label, ROUNDS)
            return None
        table, floor = next(iter(work.ways)), next(iter(steps))
        rounds = timing.interleave(
            floor,
            steps,
            ROUNDS,
            timer,
            lambda: advance(f"{label}: timing", 1),
            lambda name: self.watch(f"{label}: {name}, timing"),
        )
        self.watch("")
        ratios = {name: timing.quartiles(rounds.ratios(name, floor)) for name in steps}
        best = min(ratios, key=lambda name: ratios[name][1])
        # What is not faster in three rounds of four is not known to be faster.
        best = best if ratios[best][2] < 1 else floor
        old, new = (f"{1e6 * timing.quartiles(rounds.seconds(name))[1]:.1f}" for name in (floor, best))
        shown, was_right = "the tables'" if best == table else best, floor == table
        ratio = f"{ratios[best][1]:.3f}" if was_right else ""
        self.rows.append((str(work.size), work.op, old if was_right else "dropped", new, ratio, shown))
        return best

    def _fault(
        self,
        op: str,
        way: Way,
        operands: Operands,
        q: judge.Problem,
        want: dict[str, Tensor],
        plain: dict[str, Tensor],
    ) -> str | None:
        """Why a way is not to be taken; None where it runs, is right, gives the same bits twice and leaves nothing
        behind."""
        names = ("y", "h") if op == "forward" else ("dx", "da", "db")
        runs = []
        for _ in range(2):
            out, failure = operands.room(), None
            try:
                way.run(operands, out)
                left = self.subject.left_behind()
            except Exception as error:  # a candidate may fail in any way
                self._ask_device(error)
                failure, left = f"{type(error).__name__}: {first_line(error)}", self.subject.left_behind()
            if failure or left:
                return failure or left
            runs.append({name: out[name] for name in names})
        first, second = runs
        got = dict(first)
        if op == "forward":  # h is judged by the db that it gives
            h = got.pop("h").double()
            got["db"] = q.scale * (q.dy.double().t() @ h)
        faults = [verdict.fault for verdict in judge.judge(got, q, want, plain) if verdict.fault]
        differing = [
            f"{name}: other bits in a second run" for name in names if not torch.equal(first[name], second[name])
        ]
        return "; ".join(faults or differing) or None

    def _capture_fault(self, timer: timing.Timer, steps: list[timing.Step]) -> str | None:
        if isinstance(timer, timing.GraphTimer):
            try:
                timer.capture(steps)
            except RuntimeError as error:
                self._ask_device(error)
                return f"in a CUDA graph: {first_line(error)}"
        return None

    def _ask_device(self, error: Exception) -> None:
        """Raise DeviceLost where the device no longer answers after `error`."""
        if not answers(self.setting.device):
            raise DeviceLost(f"the GPU no longer answers after {type(error).__name__}: {first_line(error)}") from error
