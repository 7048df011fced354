"""What may hang is watched: a kernel that waits for ever cannot be stopped, only the process that launched it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch

STUCK = 3
"""The exit status of a process that ended itself because of a kernel; another process may go on."""


class Watch:
    """Ends the process where one thing takes longer than `seconds`; 0: never.

    ``with Watch(30, told) as doing: doing("the forward of q"); ...``. `told` is called first, with what it was, by a
    thread of its own: the main one waits for the GPU.
    """

    def __init__(self, seconds: float | None, told: Callable[[str], None]) -> None:
        self._seconds, self._told = seconds or 0.0, told
        self._what, self._since = "", 0.0
        self._over = threading.Event()

    def __call__(self, what: str) -> None:
        """What is done from now on; nothing: what may take its time."""
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
    """Whether the device still computes: after an illegal access a process can do nothing more with it."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


def first_line(error: BaseException) -> str:
    """The first line of what it says."""
    return (str(error).strip().splitlines() or ["no message"])[0]
