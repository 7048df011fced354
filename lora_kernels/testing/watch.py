"""A watch over a process. It ends the process if a step hangs, because a kernel that hangs cannot be stopped alone."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch

STUCK = 3
"""The exit status of a process that ended itself because a kernel hung or broke the device. Another one may go on."""


class Watch:
    """Ends the process with status `STUCK` if one step takes longer than `seconds`; never if that is 0 or None.

    ``with Watch(30, told) as watch: watch("the forward of q"); ...``. Before the process ends, a thread of the watch
    calls `told` with a sentence that names the step: the main thread is waiting for the GPU.
    """

    def __init__(self, seconds: float | None, told: Callable[[str], None]) -> None:
        self._seconds, self._told = seconds or 0.0, told
        self._what, self._since = "", 0.0
        self._over = threading.Event()

    def __call__(self, what: str) -> None:
        """Name the step that starts now. An empty name switches the limit off until the next one."""
        self._what, self._since = what, time.monotonic()

    def __enter__(self) -> Watch:
        if self._seconds:
            threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(self._seconds / 10):
            what, since = self._what, self._since
            if what and time.monotonic() - since > self._seconds:
                try:
                    self._told(f"{what}: no end after {self._seconds:g} s")
                    sys.stdout.flush()
                finally:
                    os._exit(STUCK)


def answers(device: torch.device) -> bool:
    """Return whether the device still computes. After an illegal memory access a process can do nothing more with a
    GPU."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or ["no message"])[0]
