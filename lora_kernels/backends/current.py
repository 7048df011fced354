"""Make the device of a call the current one."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch

_NOTHING = contextlib.nullcontext()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a GPU is the current device. It does nothing where the GPU is that already, which it
    nearly always is."""
    if device.index is None or torch.cuda.current_device() == device.index:
        return _NOTHING
    return torch.cuda.device(device)
