"""The device that a launch is for: what is known of it, the workspace on it, and the launch itself. Imported by
`backends.triton` and its launchers only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from lora_kernels.backends import workspace as memory


class Target(NamedTuple):
    """What a launch needs to know of the device it is for."""

    arch: str
    """"sm_90", "gfx942": what the tile tables are asked for."""
    multiprocessors: int
    guard: Callable[[], AbstractContextManager[Any]]
    """Makes the device the current one."""
    stream: Callable[[], int]
    """The current stream, as a number."""
    capturing: Callable[[], bool]
    """Whether that stream is being captured into a graph."""
    name: str | None = None
    """What the driver calls the device: what plans measured on it are kept under."""


class Launch(NamedTuple):
    """``kernel[grid](**arguments, **options)``."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        """On the current device and stream. Nothing is launched where there is no work."""
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def find_target(device: torch.device) -> Target | None:
    """The target of tensors on `device`: None where Triton cannot serve it. Asks the driver once per device."""
    if device not in TARGETS and device.type == "cuda" and torch.cuda.is_available():
        TARGETS[device] = _query(device)
    return TARGETS.get(device)


TARGETS: dict[torch.device, Target] = {}
"""Targets by device, as they become known."""


def _query(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Target(
        arch=arch,
        multiprocessors=properties.multi_processor_count,
        guard=functools.partial(torch.cuda.device, device),
        stream=lambda: torch.cuda.current_stream(device).cuda_stream,
        capturing=torch.cuda.is_current_stream_capturing,
        name=properties.name,
    )


def workspace(device: torch.device, target: Target, counters: int, floats: int) -> memory.Workspace:
    """Return the workspace of the current stream: `counters` int32 zeros, and room for `floats` fp32 partial sums."""
    capture = memory.UNNUMBERED if target.capturing() else memory.NOT_CAPTURING
    return memory.workspace(device, target.stream(), capture, counters, floats)


def cdiv(n: int, d: int) -> int:
    return -(-n // d)
