"""The back-end `composite` on CPU tensors, in Triton's interpreter, with so small tiles that a result has several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from support.interp import interpret

from lora_kernels.backends import composite
from lora_kernels.backends.composite import backward_pass, forward_pass, multi_pass, tiles
from lora_kernels.backends.triton import device
from lora_kernels.backends.triton import quant as quantised
from lora_kernels.plans.tiles import Gpu, Tile

CPU = torch.device("cpu")
_SMALL = tiles.Tile(BLOCK_M=16, BLOCK_C=32, num_warps=4, num_stages=2)
_TABLES = {
    rows: {kernel: dict.fromkeys((16, 32), _SMALL) for kernel in tiles.MATRIX[tiles.MANY]}
    for rows in (tiles.MANY, tiles.FEW)
}
_MULTI = {kind: dict.fromkeys(kernels, _SMALL) for kind, kernels in tiles.MULTI.items()}
_CACHES = forward_pass._frames, backward_pass._frames, multi_pass._low_rank, multi_pass._gradients


def target(multiprocessors: int = 6, arch: str = "sm_80") -> device.Target:
    return device.Target(Gpu(arch, multiprocessors), contextlib.nullcontext, lambda: 0, lambda: False)


@contextlib.contextmanager
def interpreted(on: device.Target | None = None) -> Iterator[ModuleType]:
    """Yield the back-end, which serves CPU tensors. Ranks up to 16 take one pass over dy, ranks up to 32 two, and
    larger ones are computed in chunks of 32. Gradients of many adapters are summed in parts of 32 rows."""
    with pytest.MonkeyPatch.context() as patch, interpret():
        patch.setitem(device.TARGETS, CPU, on or target())
        patch.setattr(tiles, "MATRIX", _TABLES)
        patch.setattr(tiles, "ORDINARY", _TABLES)
        patch.setattr(tiles, "MAX_BLOCK_R", 32)
        patch.setattr(tiles, "MAX_BOTH", 16)
        patch.setattr(tiles, "SUM_C", 16)
        patch.setattr(tiles, "MULTI", _MULTI)
        patch.setattr(tiles, "PART_MULTI", 32)
        patch.setattr(quantised, "WHOLE", Tile(BLOCK_M=0, BLOCK_N=32, BLOCK_K=64, BLOCK_R=0, num_warps=4, num_stages=1))
        for cache in _CACHES:
            cache.cache_clear()
        yield composite
    for cache in _CACHES:
        cache.cache_clear()
