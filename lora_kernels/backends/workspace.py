"""The memory that a launch on a GPU needs beside its operands: counters, and scratch for partial sums.

Scratch belongs to one call. It comes from torch's caching allocator, which hands it on to later work on the stream.

Counters are zero whenever no launch uses them: a launch finds them zero and leaves them zero. So they are cut from a
block that is zeroed once, and no launch needs a fill before it, within a CUDA graph or without. The block must not lie
in the pool of a graph. Under ``mode="reduce-overhead"`` torch runs the first call with all allocations of its thread
routed into such a pool, and raises an error if anything but a result is left alive there. The routing is bound to a
thread (in torch 2.6 to a stream), so another thread allocates the block on its own stream.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 20
"""The counters of one block, which takes 4 MB."""
LINE = 32
"""The counters of a cache line. No two launches share one."""


class Workspace(NamedTuple):
    """The memory of one launch."""

    counters: Tensor
    """int32. A launch finds them zero and leaves them zero."""
    scratch: Tensor
    """fp32, of any content."""


_blocks: dict[torch.device, list[Tensor]] = {}
"""What is left of every block of each device, the newest last. An old block stays in the list, though nothing is cut
from it any more: graphs hold addresses in it, which keep no memory alive."""
_by_stream: dict[tuple[torch.device, int], Tensor] = {}
"""The counters of each stream."""
_lock = threading.Lock()


def workspace(device: torch.device, stream: int, capturing: bool, counters: int, floats: int) -> Workspace:
    """Return at least `counters` zeros and room for `floats` fp32 numbers, for a launch on `stream`, which must be the
    current stream.

    Launches on one stream follow each other, so they share their counters. A graph may be replayed on any stream beside
    any other work, so a launch that is captured (`capturing`) gets counters that no other launch has. They are not
    given back, since nothing tells when a graph is destroyed: half a kilobyte for a launch over 8192 rows.
    """
    scratch = torch.empty(floats, dtype=torch.float32, device=device)
    with _lock:
        if capturing:
            own = _cut(device, counters)
            # Memory cannot be allocated outside the graph now. In the graph's pool the counters serve this launch only,
            # and the graph zeroes them at every replay.
            return Workspace(torch.zeros(counters, dtype=torch.int32, device=device) if own is None else own, scratch)
        _provide(device, counters)
        kept = _by_stream.get((device, stream))
        if kept is None or kept.numel() < counters:
            kept = _cut(device, max(1024, 2 * counters))
            assert kept is not None, "_provide makes room for this"
            _by_stream[device, stream] = kept
        return Workspace(kept, scratch)


def clean() -> bool:
    """Zero every counter that a launch has left in the counters of a stream. Return whether there was one."""
    left = [counters for counters in _by_stream.values() if counters.any()]
    for counters in left:
        counters.zero_()
    return bool(left)


def _cut(device: torch.device, count: int) -> Tensor | None:
    """Return at least `count` counters that nothing else uses, or None where the block has too few left."""
    count = -(-max(count, 1) // LINE) * LINE
    blocks = _blocks.get(device)
    if not blocks or blocks[-1].numel() < count:
        return None
    own, blocks[-1] = blocks[-1][:count], blocks[-1][count:]
    return own


def _provide(device: torch.device, counters: int) -> None:
    """Begin a new block where the old one is nearly used up, so that the captures to come find room in it."""
    wanted = max(BLOCK // 4, 4 * counters)
    blocks = _blocks.setdefault(device, [])
    if not blocks or blocks[-1].numel() < wanted:
        with ThreadPoolExecutor(1) as other_thread:
            blocks.append(other_thread.submit(_zeros, device, max(BLOCK, 2 * wanted)).result())


def _zeros(device: torch.device, count: int) -> Tensor:
    """Return `count` counters that are zero for every stream from now on."""
    counters = torch.zeros(count, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return counters
