"""Memory that the launches on one stream of a GPU share: counters and scratch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOT_CAPTURING = 0
"""The stream is not being captured into a graph."""
UNNUMBERED = -1
"""The stream is being captured, and the caller has no number that tells this capture from others."""


class Workspace(NamedTuple):
    """The memory of one launch. A launch finds the counters zero and leaves them zero."""

    counters: Tensor
    """int32."""
    scratch: Tensor
    """fp32, of any content."""


_workspaces: dict[tuple[torch.device, int], Workspace] = {}
_captured: dict[tuple[torch.device, int], tuple[int, Workspace]] = {}


def workspace(device: torch.device, stream: int, capture: int, counters: int, floats: int) -> Workspace:
    """Return at least `counters` zeros and room for `floats` fp32 numbers, for a launch on `stream`.

    `stream` must be the current stream. Launches on one stream follow each other, so they share one workspace. It is
    kept until a launch needs more: a part that is too small is replaced. The old part goes back to torch's allocator,
    which hands it only to later work on the same stream.

    A graph may be replayed on any stream, beside any other work, so a launch that is captured uses memory of the
    graph: it comes from the graph's own pool and is zeroed in the graph. `capture` tells which graph:

    * a positive number, different for every capture: the launches of that capture share a workspace, which is zeroed
      once per replay. The entry is stale as soon as the number differs, and the next capture on the stream drops it.
    * `UNNUMBERED`: the launch gets memory that no other launch has, and nothing is kept. PyTorch tells only that a
      stream is being captured; the number of the capture takes the native extension.
    * `NOT_CAPTURING`: the workspace of the stream, as above.
    """
    key = device, stream
    if capture == NOT_CAPTURING:
        _workspaces[key] = found = _grown(_workspaces.get(key), device, counters, floats)
        return found
    if capture == UNNUMBERED:
        return _grown(None, device, counters, floats)
    number, have = _captured.get(key, (NOT_CAPTURING, None))
    found = _grown(have if number == capture else None, device, counters, floats)
    _captured[key] = capture, found
    return found


def _grown(have: Workspace | None, device: torch.device, counters: int, floats: int) -> Workspace:
    """Return `have` with every part that is too small replaced."""
    if have is not None and have.counters.numel() >= counters and have.scratch.numel() >= floats:
        return have
    zeros, scratch = (None, None) if have is None else have
    if zeros is None or zeros.numel() < counters:
        zeros = torch.zeros(1 << max(counters - 1, 1023).bit_length(), dtype=torch.int32, device=device)
    if scratch is None or scratch.numel() < floats:
        scratch = torch.empty(floats, dtype=torch.float32, device=device)
    return Workspace(zeros, scratch)


def clean() -> bool:
    """Zero every counter that a launch has left in a kept workspace. Return whether there was one."""
    left = False
    for counters, _ in _workspaces.values():
        if counters.any():
            counters.zero_()
            left = True
    return left
