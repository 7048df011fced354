"""The device that a launch runs on, the workspace on it, and the launch itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from lora_kernels.backends import workspace as memory
from lora_kernels.plans.tiles import Gpu


class Target(NamedTuple):
    """A device that kernels can be launched on."""

    gpu: Gpu
    guard: Callable[[], AbstractContextManager[Any]]
    """Makes the device the current one."""
    stream: Callable[[], int]
    """Returns the current stream, as a number."""
    capturing: Callable[[], bool]
    """Returns whether that stream is being captured into a graph."""


class Launch(NamedTuple):
    """``kernel[grid](**arguments, **options)``."""

    kernel: Any
    programs: int
    """The size of the one-dimensional grid."""
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        """Launch on the current device and stream, or do nothing where the grid is empty."""
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def find_target(device: torch.device) -> Target | None:
    """Return the target of tensors on `device`, or None where Triton cannot serve it. The driver is asked once per
    device."""
    if device not in TARGETS and device.type == "cuda" and torch.cuda.is_available():
        TARGETS[device] = _query(device)
    return TARGETS.get(device)


TARGETS: dict[torch.device, Target] = {}
"""The targets found so far, by device."""


def _query(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Target(
        Gpu(arch, properties.multi_processor_count, device),
        guard=functools.partial(torch.cuda.device, device),
        stream=lambda: torch.cuda.current_stream(device).cuda_stream,
        capturing=torch.cuda.is_current_stream_capturing,
    )


def workspace(device: torch.device, target: Target, counters: int, floats: int) -> memory.Workspace:
    """Return the memory of a launch on the current stream: `counters` int32 zeros, and room for `floats` fp32 partial
    sums."""
    return memory.workspace(device, target.stream(), target.capturing(), counters, floats)


def cdiv(n: int, d: int) -> int:
    """Return n / d, rounded up."""
    return -(-n // d)
