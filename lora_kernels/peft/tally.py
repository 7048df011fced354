"""What a process of ``python -m lora_kernels run`` tells: the layers that PEFT has made in it, and their calls.

It writes a file when PEFT makes the first layer, and again when it ends. Layers are held weakly. The calls of a layer
that is gone by then, as after a function that has trained a model, are counted when it goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections import Counter
from multiprocessing import util
from pathlib import Path
from typing import Any

from lora_kernels.core import atomic
from lora_kernels.peft import kinds
from lora_kernels.peft.layer import FusedLayer


class Tally:
    """What one process tells."""

    def __init__(self, folder: str) -> None:
        self.pid = os.getpid()
        self.file = Path(folder) / f"{self.pid}.json"
        self.layers: dict[int, weakref.ref[Any]] = {}
        """The fused layers that have not been counted yet, by id."""
        self.made, self.fused_calls = 0, 0
        self.not_fused, self.passed_over = Counter[str](), Counter[str]()
        # A Finalize runs at the end of a process that multiprocessing has forked too, where atexit does not.
        util.Finalize(None, self.end, exitpriority=0)

    def note(self, layer: Any) -> None:
        """Take in a layer that PEFT has just made."""
        self.made += 1
        if isinstance(layer, FusedLayer):
            self.layers[id(layer)] = weakref.ref(layer)
        else:
            kind = kinds.fused_kind(type(layer), layer)
            self.not_fused[kind if isinstance(kind, str) else "disable() was called"] += 1
        if self.made == 1:
            self.write(ended=False)

    def count(self, layer: Any) -> None:
        """Add the calls of `layer` if it was noted, once."""
        if self.layers.pop(id(layer), None) is not None:
            self.fused_calls += layer.fused_calls
            self.passed_over.update(layer.passed_over)

    def end(self) -> None:
        """Count the layers that are alive, and write the file."""
        for ref in list(self.layers.values()):
            if isinstance(layer := ref(), FusedLayer):  # unfuse may have been called
                self.count(layer)
        self.write(ended=True)

    def write(self, ended: bool) -> None:
        """Write the file. A run whose folder is gone has ended before this process, and prints no line any more."""
        told = {
            "made": self.made,
            "fused_calls": self.fused_calls,
            "not_fused": self.not_fused,
            "passed_over": self.passed_over,
            "ended": ended,
        }
        if self.file.parent.is_dir():
            with contextlib.suppress(OSError):
                atomic.replace({self.file: json.dumps(told).encode()})


_tally: Tally | None = None
"""The tally of this process. A process that was forked makes its own."""


def note(layer: Any, folder: str) -> None:
    """Note a layer that PEFT has made in this process, for the run that reads `folder`."""
    global _tally
    if _tally is None or _tally.pid != os.getpid():
        _tally = Tally(folder)
        FusedLayer.__del__ = _count_at_its_end  # type: ignore[attr-defined]
    _tally.note(layer)


def _count_at_its_end(layer: Any) -> None:
    if _tally is not None:
        _tally.count(layer)
