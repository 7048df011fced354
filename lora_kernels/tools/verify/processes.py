"""The processes that `verify` starts: one job each, in a session of its own, ended where a kernel hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lora_kernels.tools.verify.events import RUN, SLOW, Listener

START: tuple[str, ...] = (sys.executable, "-m", "lora_kernels.tools.verify.child")
"""The command that starts a process; a job and a file for its events follow."""

SLOW_SECONDS = 600.0
"""How long a process may take to start, and then for each step that compiles or prepares."""
LINE = 300
"""The most characters of a process's last line that are shown."""


class Ending(NamedTuple):
    """How a process ended."""

    how: str
    """`WELL`, `STUCK` or `DIED`."""
    why: str
    """A phrase; empty where all is well."""
    last: dict[str, Any]
    """The last step that the process told of."""


WELL, STUCK, DIED = "well", "stuck", "died"


@dataclass
class Job:
    """One job of a process, and what is done with its events."""

    name: str
    """What the job is about, for people to read."""
    what: dict[str, Any]
    """The job as `child` takes it."""
    hear: Callable[[dict[str, Any]], None]
    """Called with every event that is no step."""
    environment: dict[str, str] = field(default_factory=dict)


class Process:
    """A job that runs."""

    def __init__(self, job: Job, folder: Path, number: int, patience: float) -> None:
        self.job, self._patience = job, {RUN: patience, SLOW: SLOW_SECONDS}
        events, self._said = folder / f"{number}.events", folder / f"{number}.log"
        self._listener = Listener(events)
        self._last: dict[str, Any] = {"doing": "start", "limit": SLOW}
        self._since, self._ended = time.monotonic(), False
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [*START, json.dumps(job.what | {"parent": os.getpid()}), str(events)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | job.environment,
            )

    def look(self) -> Ending | None:
        """Hear what the process has told since. Return how it ended, or None while it runs."""
        status = self._process.poll()  # before the events are read, so that none is missed
        for event in self._listener.read():
            self._since = time.monotonic()
            if "doing" in event:
                self._last = event
            elif "end" in event:
                self._ended = True
            else:
                self.job.hear(event)
        if status is not None:
            if status == 0 and self._ended:
                return Ending(WELL, "", self._last)
            return Ending(DIED, self._died(status), self._last)
        limit = self._patience[self._last["limit"]]
        if time.monotonic() - self._since > limit:
            return Ending(STUCK, f"{self._last['doing']}: no end after {limit:g} s", self._last)
        return None

    def kill(self) -> None:
        """End the process and everything that it started. One that waits for a GPU may stay a while."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._listener.close()

    def _died(self, status: int) -> str:
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        lines = self._said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{self._last['doing']}: {how}" + (f": {lines[-1].strip()[:LINE]}" if lines else "")


def run(
    jobs: Sequence[Job], at_once: int, patience: float, more: Callable[[], bool] = lambda: True
) -> Generator[tuple[Job, Ending], None, None]:
    """Run jobs, `at_once` at a time, and yield each as it ends. No further job is started once `more` returns False.

    `patience` is how long, in seconds, a process may wait for a kernel that it has launched. What still runs is ended
    where the caller closes the generator.
    """
    waiting, running = list(enumerate(jobs)), list[Process]()
    with tempfile.TemporaryDirectory(prefix="lora_kernels_verify_") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    if not more():
                        waiting.clear()
                        break
                    number, job = waiting.pop(0)
                    running.append(Process(job, Path(folder), number, patience))
                for process in list(running):
                    if ending := process.look():
                        running.remove(process)
                        process.kill()
                        yield process.job, ending
                time.sleep(0.02)
        finally:
            for process in running:
                process.kill()
