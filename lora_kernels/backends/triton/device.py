"""The device that a launch is for: what is known of it, the workspace on it, and the launch itself. Imported by
`backends.triton` and its launchers only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor


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


_workspaces: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def workspace(device: torch.device, target: Target, counters: int, floats: int) -> tuple[Tensor, Tensor]:
    """(sync, part): `counters` int32 zeros, which a launch leaves zero, and room for `floats` fp32 partial sums.

    One pair per device and stream, because launches on one stream do not overlap; it grows to the largest that was
    asked for. A launch that is being captured gets its own, from the graph's memory pool, which lives as long as the
    graph and is zeroed at every replay.
    """
    if target.capturing():
        return _allocate(device, counters, floats)
    key = (device, target.stream())
    sync, part = _workspaces.get(key, (None, None))
    if sync is None or part is None or sync.numel() < counters or part.numel() < floats:
        held = (0, 0) if sync is None or part is None else (sync.numel(), part.numel())
        sync, part = _workspaces[key] = _allocate(device, max(counters, held[0]), max(floats, held[1]))
    return sync, part


def _allocate(device: torch.device, counters: int, floats: int) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(1 << max(counters - 1, 1023).bit_length(), dtype=torch.int32, device=device),
        torch.empty(floats, dtype=torch.float32, device=device),
    )


def cdiv(n: int, d: int) -> int:
    return -(-n // d)
