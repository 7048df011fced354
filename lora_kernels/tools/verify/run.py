"""The measurements on one kind of GPU: one process after the other, and what they find in the file of evidence."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lora_kernels.evidence import file
from lora_kernels.evidence.file import BROKEN, RIGHT, STUCK, Bucket, Evidence, Timing, Verdict
from lora_kernels.evidence.find import VARIABLE
from lora_kernels.evidence.identity import Identity
from lora_kernels.testing.terminal import Terminal
from lora_kernels.tools.verify import processes, report
from lora_kernels.tools.verify.options import Wanted
from lora_kernels.tools.verify.processes import WELL, Ending, Job
from lora_kernels.tools.verify.rivals import FROZEN

Advance = Callable[[str, int], None]


class Run:
    """Everything that `verify` does for one device."""

    def __init__(
        self, gpu: dict[str, Any], path: Path, wanted: Wanted, args: argparse.Namespace, end: float | None,
        show: Terminal,
    ) -> None:  # fmt: skip
        self.gpu, self.wanted, self.args, self.end, self.show = gpu, wanted, args, end, show
        self.identity = Identity(**gpu["identity"])
        self.found = report.Findings(path, self.identity)
        self.complete = True
        """Whether all that was asked for has been measured."""
        self._advance: Advance = lambda what, steps: None

    def measure(self) -> None:
        """Judge every class, measure plans where that was asked for, and time every pass.

        The types that are not timed are judged last, because the time may be limited.
        """
        self.show.line(report.heading(self.identity))
        for line in report.advice(self.identity, self.gpu["refusals"]):
            self.show.line(line)
        classes, timed = self.gpu["classes"], self.wanted.timed.to_json()
        tuned = len(self.wanted.passes) if self.args.tune else 0
        with self.show.progress(len(classes) + tuned + len(self.wanted.passes)) as self._advance:
            self._judge([each for each in classes if each["setting"] == timed])
            if self.args.tune:
                self._tune()
            self._time()
            self._judge([each for each in classes if each["setting"] != timed])

    def tell(self) -> None:
        """Show what was switched on, what was not and why, and where it was written."""
        chosen: dict[str, str] = {}
        if self.found.timings:
            passes = [each for each in self.wanted.passes if str(each) in self.found.timings]
            job = self._job("chosen", lambda event: chosen.update([event["chosen"]]), passes=passes)
            ending = self._run(job)
            if ending.how != WELL:
                self._note(f"the choice could not be asked for: {ending.why}")
        report.show(self.show, self.found, chosen)

    def _judge(self, classes: Sequence[dict[str, Any]]) -> None:
        """Run classes of kernels, each in a process of its own."""
        jobs = []
        for each in classes:
            job = self._job("class", self._hear, **{"class": each})
            job.name = each["key"]
            jobs.append(job)
        with closing(processes.run(jobs, self.args.jobs, self.args.timeout, self._time_is_left)) as running:
            for job, ending in running:
                self._advance(job.name, 1)
                if ending.how == WELL or job.name in self.found.verdicts:
                    continue
                if ending.last.get("blame"):
                    self._verdict(job.name, STUCK if ending.how == processes.STUCK else BROKEN, ending.why)
                else:  # its kernels had not been called yet
                    self._note(f"{job.name}: not judged: {ending.why}")
        if left := sum(job.name not in self.found.verdicts for job in jobs):
            self._missing(f"{left} of {len(jobs)} classes of kernels were not judged")

    def _tune(self) -> None:
        """Measure plans. After a plan that hangs, another process goes on without it."""
        skipped: list[tuple[str, str]] = []
        passes = list(self.wanted.passes)

        def hear(event: dict[str, Any]) -> None:
            if "step" in event:
                passes[:] = [each for each in passes if str(each) != event["step"]]
                self._advance(f"plans: {event['step']}", 1)
            else:
                self._hear(event)

        while passes and self._time_is_left():
            job = self._job("plans", hear, passes=passes, skipped=skipped, rounds=self.wanted.rounds)
            ending = self._run(job)
            if ending.how == WELL:
                break
            self._missing(f"plans: {ending.why}")
            lost = ending.last.get("job"), ending.last.get("plan")
            if lost[0] is None or lost in skipped:
                break
            skipped.append((str(lost[0]), str(lost[1] or "")))

    def _time(self) -> None:
        """Time every pass. After a variant that hangs or dies, another process goes on without it."""
        left, without = list(self.wanted.passes), list[str]()

        def hear(event: dict[str, Any]) -> None:
            done = event.get("done", event.get("failed"))
            if done is not None:
                left[:] = [each for each in left if str(each) != done]
                self._advance(f"times: {done}", 1)
            self._hear(event)

        while left and self._time_is_left():
            job = self._job("times", hear, passes=left, rounds=self.wanted.rounds, without=without)
            ending = self._run(job)
            if ending.how == WELL:
                break
            at, name, key = (ending.last.get(field) for field in ("at", "variant", "key"))
            if key:
                self._verdict(key, STUCK if ending.how == processes.STUCK else BROKEN, ending.why)
            elif at is None:
                self._missing(f"the times: {ending.why}")
                break
            elif name in (None, FROZEN) or name in without:
                self._missing(ending.why)
                left[:] = [each for each in left if str(each) != at]
            else:
                self._missing(ending.why)
                without.append(name)
        unmeasured = [str(each) for each in self.wanted.passes if str(each) not in self.found.timings]
        if unmeasured:
            self._missing(f"not timed: {', '.join(unmeasured)}")

    def _run(self, job: Job) -> Ending:
        """Run one job alone."""
        with closing(processes.run([job], 1, self.args.timeout)) as running:
            return next(running)[1]

    def _job(self, kind: str, hear: Callable[[dict[str, Any]], None], **more: Any) -> Job:
        timed = self.wanted.timed.to_json()
        seconds = None if self.end is None else max(0.0, self.end - time.monotonic())
        what = {"kind": kind, "device": self.gpu["device"], "timed": timed, "seconds": seconds, **more}
        return Job(kind, what, hear, {VARIABLE: str(self.found.path)})

    def _hear(self, event: dict[str, Any]) -> None:
        """Keep what a process has found."""
        if "note" in event:
            self._note(event["note"])
        elif "verdict" in event:
            self._verdict(**event["verdict"])
        elif "timing" in event:
            found = event["timing"]
            ratios = {name: (low, middle, high) for name, (low, middle, high) in found["ratios"].items()}
            timing = Timing(found["frozen_seconds"], ratios, file.today())
            self.found.timings[event["done"]] = timing
            self._keep(Evidence(self.identity, timings={Bucket(**found["bucket"]): timing}))
        elif "fastest" in event:
            self._plan(event["fastest"], event["key"], event["row"])

    def _plan(self, plan: dict[str, Any], key: str | None, row: list[str]) -> None:
        """Keep a plan, unless its class is known not to be right. A class that was not judged is right, since every
        plan is judged before it is timed."""
        if key is None or self.found.verdicts.get(key, _UNKNOWN).result not in (RIGHT, _UNKNOWN.result):
            self._note(f"{row[0]} {row[1]}: {row[-1]} is not kept, because {key} is not right here")
            return
        self.found.rows.append(row)
        self._keep(Evidence(self.identity, plans=plan))
        if key not in self.found.verdicts:
            self._verdict(key, RIGHT, "")

    def _verdict(self, key: str, result: str, why: str) -> None:
        self.found.verdicts[key] = verdict = Verdict(result, why, file.today())
        if result != RIGHT:
            self._note(f"{key}: {result}: {why}")
        self._keep(Evidence(self.identity, {key: verdict}))

    def _keep(self, found: Evidence) -> None:
        file.add(self.found.path, found)

    def _note(self, text: str) -> None:
        self.show.line(f"✗ {text}")

    def _missing(self, text: str) -> None:
        self._note(text)
        self.complete = False

    def _time_is_left(self) -> bool:
        return self.end is None or time.monotonic() < self.end


_UNKNOWN = Verdict("unknown", "", "")
