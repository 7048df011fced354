"""The job of a process that times the back-ends that are right beside their rivals."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_kernels.backends import dispatch
from lora_kernels.evidence import file
from lora_kernels.evidence import find as evidence
from lora_kernels.evidence.file import BROKEN, RIGHT, WRONG, Evidence, Verdict
from lora_kernels.testing import timing
from lora_kernels.testing.watch import answers, first_line
from lora_kernels.tools.verify import judging, rivals
from lora_kernels.tools.verify.cases import back_ends, key_of
from lora_kernels.tools.verify.events import RUN, SLOW, Teller
from lora_kernels.tools.verify.judging import DeviceLost
from lora_kernels.tools.verify.rivals import FROZEN
from lora_kernels.tools.verify.subject import Operands, Setting, Size, run_of

GRAPH_ROWS = 1024
"""Calls of at most this M are timed in a CUDA graph, because they may be shorter than Python needs to launch them."""


class Pass(NamedTuple):
    """A pass over a layer that is timed."""

    size: Size
    p: float
    op: str

    def __str__(self) -> str:
        return f"{self.size} p={self.p:g} {self.op}"


def main(
    device: torch.device, setting: Setting, passes: Sequence[Pass], rounds: int, without: Sequence[str], end: float,
    tell: Teller,
) -> None:  # fmt: skip
    """Time every pass that can be begun before `end`, and tell the times of each as they come. Variants in `without`
    are left out."""
    operands: list[Operands] = []
    by: judging.Standard | None = None
    last: tuple[Size, float] | None = None
    for each in passes:
        if time.monotonic() > end:
            return
        tell.doing(f"{each}: prepare", SLOW, at=str(each))
        try:
            if last != (each.size, each.p):
                operands, by, last = [], None, None  # frees memory before more is asked for
                operands = operand_sets(setting._replace(p=each.p), each.size, device)
                by, last = judging.standard(operands[0]), (each.size, each.p)
            assert by is not None
            _Timed(device, setting._replace(p=each.p), each, without, tell).measure(operands, by, rounds)
        except torch.OutOfMemoryError:
            tell(note=f"{each}: not measured, because the GPU has too little free memory", failed=str(each))


def operand_sets(setting: Setting, size: Size, device: torch.device) -> list[Operands]:
    """Return enough sets of operands that a GPU finds none of them in its L2 cache."""
    first = Operands(setting, size, device, 0)
    count = timing.operand_sets(device, first.nbytes)
    return [first, *(Operands(setting, size, device, seed) for seed in range(1, count))]


def timer_for(device: torch.device, M: int) -> timing.Timer:
    """Return the timer for calls of M rows."""
    if device.type == "cuda" and M <= GRAPH_ROWS:
        return timing.GraphTimer()
    return timing.timer_for(device)


class _Timed:
    """One pass, its variants, and what is told about each."""

    def __init__(
        self, device: torch.device, setting: Setting, each: Pass, without: Sequence[str], tell: Teller
    ) -> None:
        self.device, self.setting, self.each, self.without, self.tell = device, setting, each, without, tell
        self.call = setting.call(each.op, device, each.size)
        self.timer = timer_for(device, each.size.M)
        self.keys: dict[str, str] = {}
        """The classes of the back-ends, by name."""

    def measure(self, sets: list[Operands], by: judging.Standard, rounds: int) -> None:
        """Time the pass and tell the times."""
        steps = {FROZEN: [rivals.frozen(self.each.op, operands) for operands in sets]}
        if self._capture(FROZEN, steps[FROZEN]) is not None:
            return
        for name in self._right():
            if self._fault(name, sets[0], by) is None:
                run = run_of(dispatch.load(name), self.each.op)
                made: list[timing.Step] = [functools.partial(run, operands, operands.results) for operands in sets]
                if self._capture(name, made) is None:
                    steps[name] = made
        quantised, in_a_graph = bool(self.setting.quant), isinstance(self.timer, timing.GraphTimer)
        for name, make in rivals.others(quantised, in_a_graph, self.each.op).items():
            if name not in self.without and (made := self._rival(name, make, sets)):
                steps[name] = made
        measured = timing.interleave(
            FROZEN, steps, rounds, self.timer, doing=lambda name: self._doing(name, "timing", RUN)
        )
        ratios = {name: timing.quartiles(measured.ratios(name, FROZEN)) for name in steps if name != FROZEN}
        frozen = timing.quartiles(measured.seconds(FROZEN))[1]
        bucket = file.bucket_of(self.call)._asdict()
        self.tell(timing={"bucket": bucket, "frozen_seconds": frozen, "ratios": ratios}, done=str(self.each))

    def _right(self) -> list[str]:
        """Return the back-ends to time: `eager`, and those whose classes are right."""
        found = [] if "eager" in self.without else ["eager"]
        for name in back_ends(self.device):
            key = key_of(name, self.call)
            verdict = evidence.of(self.device).verdicts.get(key) if key else None
            if key and verdict and verdict.result == RIGHT:
                self.keys[name] = key
                found.append(name)
        return found

    def _fault(self, name: str, operands: Operands, by: judging.Standard) -> str | None:
        """Return what is wrong with a back-end's results at this size, and tell it."""
        run = run_of(dispatch.load(name), self.each.op)
        failed = judging.fault(
            self.each.op, run, operands, by, lambda what, limit: self._doing(name, f"check, {what}", limit)
        )
        if failed is None:
            return None
        self._failed(name, BROKEN if failed.raised else WRONG, failed.why)
        return failed.why

    def _capture(self, name: str, steps: list[timing.Step]) -> str | None:
        """Return why the steps cannot be captured into a CUDA graph, where the timer needs that."""
        if not isinstance(self.timer, timing.GraphTimer):
            return None
        self._doing(name, "capture", RUN)
        try:
            self.timer.capture(steps)
        except RuntimeError as error:
            if not answers(self.device):
                raise DeviceLost(f"the GPU no longer answers after {first_line(error)}") from error
            self.tell(note=f"{self.each}: {name} is not measured in a CUDA graph: {first_line(error)}")
            return first_line(error)
        return None

    def _rival(self, name: str, make: rivals.Make, sets: list[Operands]) -> list[timing.Step]:
        """Return the steps of another's layer; none, with a note, where it fails."""
        self._doing(name, "prepare", SLOW)
        try:
            steps = [make(self.each.op, operands) for operands in sets]
            self._doing(name, "first call", RUN)
            steps[0]()
            judging.synchronize(self.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # another project's layer may fail in any way
            if not answers(self.device):
                raise
            self.tell(note=f"{self.each}: {name} is not measured: {type(error).__name__}: {first_line(error)}")
            return []
        return steps if self._capture(name, steps) is None else []

    def _failed(self, name: str, result: str, why: str) -> None:
        if name not in self.keys:
            self.tell(note=f"{self.each}: {name} is not measured: {why}")
            return
        key, why = self.keys[name], f"{self.each.size}: {why}"
        self.tell(verdict={"key": key, "result": result, "why": why})
        known = evidence.of(self.device)
        verdict = Verdict(result, why, file.today())
        evidence.remember(self.device, Evidence(known.identity, {key: verdict}))

    def _doing(self, name: str, what: str, limit: str) -> None:
        more: dict[str, Any] = {"at": str(self.each), "variant": name, "key": self.keys.get(name)}
        self.tell.doing(f"{self.each}: {name}: {what}", limit, **more)
