"""The job of a process that measures plans of `triton` and `cuda`.

The judge decides whether each plan's results are right, and every plan must give the same bits twice. A plan that fails
to compile, asks for more than the GPU has, or is wrong is dropped. The others are timed in turn; the fastest is kept.
Nothing else in the package searches for plans.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch

from lora_kernels.evidence import find as evidence
from lora_kernels.evidence.file import Evidence
from lora_kernels.plans import choose, store
from lora_kernels.testing import timing
from lora_kernels.testing.watch import answers, first_line
from lora_kernels.tools.verify import judging, times
from lora_kernels.tools.verify.cases import key_of
from lora_kernels.tools.verify.events import RUN, SLOW, Teller
from lora_kernels.tools.verify.subject import Job, Operands, Setting, Subject, Trial
from lora_kernels.tools.verify.times import Pass

BACKENDS = ("triton", "cuda")
"""The back-ends that have plans."""


def main(
    device: torch.device, setting: Setting, passes: Sequence[Pass], rounds: int, skipped: Sequence[tuple[str, str]],
    end: float, tell: Teller,
) -> None:  # fmt: skip
    """Measure the plans of every pass that can be begun before `end`, and tell the fastest of each as they come.

    `skipped` names jobs by key, and plans of theirs that an earlier process could not end; an empty name stands for the
    whole job.
    """
    for each in passes:
        if time.monotonic() > end:
            return
        with_p = setting._replace(p=each.p)
        for name in BACKENDS:
            key = key_of(name, with_p.call(each.op, device, each.size))
            verdict = evidence.of(device).verdicts.get(key) if key else None
            if key is None or (verdict is not None and verdict.result != "right"):
                continue
            subject = subject_of(name, device, with_p)
            job = subject.job(each.size, each.op)
            label = f"{name} {each}"
            if (job.key, "") in skipped:
                continue
            trials = {plan: trial for plan, trial in job.trials.items() if (job.key, plan) not in skipped}
            try:
                with subject.guard():
                    _Tuned(device, with_p, job, label, tell).measure(trials, name, rounds)
            except torch.OutOfMemoryError as error:
                tell(note=f"{label}: not measured: {first_line(error)}")
        tell(step=str(each))


def subject_of(name: str, device: torch.device, setting: Setting) -> Subject:
    """Return a back-end on a device, as its plans are measured."""
    # The back-ends are imported where they are measured: Triton is optional and slow to import.
    if name == "cuda":
        from lora_kernels.tools.verify.cuda import CudaSubject

        return CudaSubject(device, setting)
    from lora_kernels.tools.verify.triton import TritonSubject

    return TritonSubject(device, setting)


class _Tuned:
    """One pass by one back-end, and what is told about its plans."""

    def __init__(self, device: torch.device, setting: Setting, job: Job, label: str, tell: Teller) -> None:
        self.device, self.setting, self.job, self.label, self.tell = device, setting, job, label, tell
        self.timer = times.timer_for(device, job.size.M)

    def measure(self, trials: dict[str, Trial], name: str, rounds: int) -> None:
        """Tell the fastest plan of those that are right."""
        job, table = self.job, next(iter(self.job.trials))
        self._doing("", "prepare", SLOW)
        sets = times.operand_sets(self.setting, job.size, self.device)
        by = judging.standard(sets[0])
        steps: dict[str, list[timing.Step]] = {}
        for plan, trial in trials.items():
            made: list[timing.Step] = [functools.partial(trial.run, operands, operands.results) for operands in sets]
            why = self._fault(plan, trial, sets[0], by) or self._capture_fault(plan, made)
            if why is None:
                steps[plan] = made
            else:
                self.tell(note=f"{self.label}: dropped {plan}: {why}")
        if not steps:
            self.tell(note=f"{self.label}: no plan gives right results")
            return
        floor = next(iter(steps))
        measured = timing.interleave(
            floor, steps, rounds, self.timer, doing=lambda plan: self._doing(plan, "timing", RUN)
        )
        ratios = {plan: timing.quartiles(measured.ratios(plan, floor)) for plan in steps}
        best = min(ratios, key=lambda plan: ratios[plan][1])
        # A plan that is not faster in three rounds of four is not known to be faster.
        best = best if ratios[best][2] < 1 else floor
        old, new = (f"{1e6 * timing.quartiles(measured.seconds(plan))[1]:.1f}" for plan in (floor, best))
        kept = {job.key: store.written(job.trials[best].plan)}
        # The plan may belong to another class than the one that ran before.
        evidence.remember(self.device, Evidence(evidence.of(self.device).identity, plans=kept))
        choose.cache_clear()
        key = key_of(name, self.setting.call(job.op, self.device, job.size))
        ratio = f"{ratios[best][1]:.3f}" if floor == table else ""
        shown = "the tables'" if best == table else best
        row = [str(job.size), f"{name} {job.op}", old if floor == table else "dropped", new, ratio, shown]
        self.tell(fastest=kept, key=key, row=row)

    def _fault(self, plan: str, trial: Trial, operands: Operands, by: judging.Standard) -> str | None:
        failed = judging.fault(self.job.op, trial.run, operands, by, lambda what, limit: self._doing(plan, what, limit))
        return None if failed is None else failed.why

    def _capture_fault(self, plan: str, steps: list[timing.Step]) -> str | None:
        """Return why the steps cannot be captured into a CUDA graph, where the timer needs that."""
        if isinstance(self.timer, timing.GraphTimer):
            self._doing(plan, "capture", RUN)
            try:
                self.timer.capture(steps)
            except RuntimeError as error:
                if not answers(self.device):
                    raise judging.DeviceLost(f"the GPU no longer answers after {first_line(error)}") from error
                return f"in a CUDA graph: {first_line(error)}"
        return None

    def _doing(self, plan: str, what: str, limit: str) -> None:
        self.tell.doing(f"{self.label}: {plan}: {what}", limit, job=self.job.key, plan=plan)
