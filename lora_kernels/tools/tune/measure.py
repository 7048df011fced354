"""How ``tune`` measures.

The judge decides whether each plan's results are right, and every plan must give the same bits twice. A plan that fails
to compile, asks for more than the GPU has, or is wrong is dropped. The others are timed in turn; the fastest is kept.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.plans import choose, store
from lora_kernels.testing import judge, timing
from lora_kernels.testing.terminal import Terminal
from lora_kernels.testing.watch import Watch, answers, first_line
from lora_kernels.tools.tune.subject import Job, Operands, Size, Subject, Trial

ROUNDS = 9
GRAPH_ROWS = 1024
"""Calls of at most this M are timed in a CUDA graph, because they may be shorter than Python needs to launch them."""


class DeviceLost(RuntimeError):
    """The GPU no longer answers, as after an illegal access."""


class Limits(NamedTuple):
    """How long a command may measure."""

    seconds: float | None = None
    """No further pass is begun after this long. None: no limit."""
    stuck: float | None = None
    """The process ends where one plan takes longer. None: no limit."""


class Standard(NamedTuple):
    """What the results of a job are judged by, as `judge.judge` takes it."""

    q: judge.Problem
    want: dict[str, Tensor]
    plain: dict[str, Tensor]


class Tuner:
    """Measures the plans of one back-end on one device."""

    def __init__(self, subject: Subject, show: Terminal) -> None:
        self.subject, self.setting, self.on, self.show = subject, subject.setting, subject.on, show
        self.rows: list[tuple[str, ...]] = []
        """One row of the table of results for every pass that was measured."""
        self.watch = Watch(None, show.line)

    def tune(self, sizes: Sequence[Size], keep: bool, limits: Limits) -> bool:
        """Measure both passes of every size. With `keep` each result is written as soon as it is found.

        Returns False where something could not be measured or kept.
        """
        jobs = self.subject.jobs(sizes)
        complete, start = True, time.monotonic()
        self.watch = Watch(
            limits.stuck, lambda what: self.show.line(f"✗ {what}: nothing more can be measured by this process")
        )
        with self.watch, self.show.progress(sum(len(job.trials) + ROUNDS for job in jobs)) as advance:
            for job in jobs:
                label = f"{job.size} {job.op}"
                if limits.seconds is not None and time.monotonic() - start > limits.seconds:
                    self.show.line(f"{label}: not measured, {limits.seconds:g} s being spent")
                    complete = False
                    continue
                try:
                    best = self._measure(job, label, advance)
                except DeviceLost as error:
                    self.show.line(f"{label}: {error}: nothing more can be measured by this process")
                    return False
                except torch.OutOfMemoryError as error:
                    self.show.line(f"{label}: not measured: {first_line(error)}")
                    complete = False
                    continue
                if best is None:
                    self.show.line(f"{label}: no plan gives right results")
                    complete = False
                    continue
                self.show.line(f"{label}: {', '.join(self.rows[-1][2:])}")
                if keep:
                    complete &= self._keep(job, label, best)
        return complete

    def _keep(self, job: Job, label: str, best: str) -> bool:
        """Write the best plan to the file, unless it is the one that runs anyway. Return whether it could be
        written."""
        plans = {key: plan for key, plan in store.load(self.on.name).items() if key != job.key}
        if best != next(iter(job.trials)):
            plans[job.key] = job.trials[best].plan
        try:
            choose.keep(self.on.name, plans)
        except OSError as error:
            self.show.line(f"{label}: not kept: {error} (XDG_CACHE_HOME names another cache directory)")
            return False
        return True

    def _measure(self, job: Job, label: str, advance: Any) -> str | None:
        """Return the fastest plan of those that are right, or None where none is."""
        device = self.on.device
        sets = [Operands(self.setting, job.size, device, 0)]
        count = timing.operand_sets(device, sets[0].nbytes)
        sets += [Operands(self.setting, job.size, device, seed) for seed in range(1, count)]
        timer = timing.timer_for(device)
        if device.type == "cuda" and job.size.M <= GRAPH_ROWS:
            timer = timing.GraphTimer()
        steps = self._right(job, label, sets, timer, advance)
        if not steps:
            advance(label, ROUNDS)
            return None
        table, floor = next(iter(job.trials)), next(iter(steps))
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
        # A plan that is not faster in three rounds of four is not known to be faster.
        best = best if ratios[best][2] < 1 else floor
        old, new = (f"{1e6 * timing.quartiles(rounds.seconds(name))[1]:.1f}" for name in (floor, best))
        shown, was_right = "the tables'" if best == table else best, floor == table
        ratio = f"{ratios[best][1]:.3f}" if was_right else ""
        self.rows.append((str(job.size), job.op, old if was_right else "dropped", new, ratio, shown))
        return best

    def _right(
        self, job: Job, label: str, sets: list[Operands], timer: timing.Timer, advance: Any
    ) -> dict[str, list[timing.Step]]:
        """Return the steps to time, one for each set of operands, of every plan that is right. Show why the others are
        dropped."""
        q, w = sets[0].q, sets[0].w
        q, plain = (q, judge.evaluate(q)) if isinstance(w, Tensor) else judge.over_codes(q, w)
        standard = Standard(q, judge.truth(q), plain)
        steps: dict[str, list[timing.Step]] = {}
        for name, trial in job.trials.items():
            advance(f"{label}: checking", 1)
            self.watch(f"{label}: {name}")
            each: list[timing.Step] = [functools.partial(trial.run, operands, operands.results) for operands in sets]
            fault = self._fault(job.op, trial, sets[0], standard) or self._capture_fault(timer, each)
            if fault is None:
                steps[name] = each
            else:
                self.show.line(f"{label}: dropped {name}: {fault}")
        self.watch("")
        return steps

    def _fault(self, op: str, trial: Trial, operands: Operands, standard: Standard) -> str | None:
        """Return why a plan is dropped. None where it runs, is right, gives the same bits twice and leaves nothing
        behind."""
        names = ("y", "h") if op == "forward" else ("dx", "da", "db")
        runs = []
        for _ in range(2):
            out, failure = operands.room(), None
            try:
                trial.run(operands, out)
                left = self.subject.left_behind()
            except Exception as error:  # a plan may fail in any way
                self._ask_device(error)
                failure, left = f"{type(error).__name__}: {first_line(error)}", self.subject.left_behind()
            if failure or left:
                return failure or left
            runs.append({name: out[name] for name in names})
        first, second = runs
        got, q = dict(first), standard.q
        if op == "forward":  # h is judged by the db that it gives
            h = got.pop("h").double()
            got["db"] = q.scale * (q.dy.double().t() @ h)
        faults = [verdict.fault for verdict in judge.judge(got, *standard) if verdict.fault]
        differing = [
            f"{name}: other bits in a second run" for name in names if not torch.equal(first[name], second[name])
        ]
        return "; ".join(faults or differing) or None

    def _capture_fault(self, timer: timing.Timer, steps: list[timing.Step]) -> str | None:
        """Return why the steps cannot be captured into a CUDA graph, where the timer needs that."""
        if isinstance(timer, timing.GraphTimer):
            try:
                timer.capture(steps)
            except RuntimeError as error:
                self._ask_device(error)
                return f"in a CUDA graph: {first_line(error)}"
        return None

    def _ask_device(self, error: Exception) -> None:
        """Raise DeviceLost where the device no longer answers after `error`."""
        if not answers(self.on.device):
            raise DeviceLost(f"the GPU no longer answers after {type(error).__name__}: {first_line(error)}") from error
