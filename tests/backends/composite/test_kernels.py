"""The results of the back-end `composite` in Triton's interpreter: the launches of a GPU on CPU tensors. The tiles are
so small that every result has several."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from support import judging

from lora_kernels.backends.each import backward_each, forward_each
from lora_kernels.core.dropout import dropout, keep_mask, rescale
from lora_kernels.core.operands import Adapter, Base, Call, Needs
from lora_kernels.quant.weight import FORMATS, quantize_weight
from lora_kernels.testing import one_layer
from lora_kernels.testing.judge import judge, over_codes

pytest.importorskip("lora_kernels.backends.composite", exc_type=ImportError)
from support.interp import interpret

from lora_kernels.backends import composite
from lora_kernels.backends.composite import backward_pass, forward_pass, tiles
from lora_kernels.backends.triton import device
from lora_kernels.backends.triton import quant as quantised
from lora_kernels.plans.tiles import Gpu, Tile

CPU = torch.device("cpu")
_SMALL = tiles.Tile(BLOCK_M=16, BLOCK_C=32, num_warps=4, num_stages=2)
_TABLES = {
    rows: {kernel: dict.fromkeys((16, 32), _SMALL) for kernel in (tiles.DOWN, tiles.UP, tiles.OVER_DY, tiles.OVER_X)}
    for rows in (tiles.MANY, tiles.FEW)
}


def target(multiprocessors: int = 6, arch: str = "sm_80") -> device.Target:
    return device.Target(Gpu(arch, multiprocessors), contextlib.nullcontext, lambda: 0, lambda: False)


@contextlib.contextmanager
def interpreted(on: device.Target | None = None) -> Iterator[ModuleType]:
    """Yield the back-end, which serves CPU tensors. Ranks up to 16 take one pass over dy, ranks up to 32 two, and larger
    ones are computed in chunks of 32."""
    with pytest.MonkeyPatch.context() as patch, interpret():
        patch.setitem(device.TARGETS, CPU, on or target())
        patch.setattr(tiles, "MATRIX", _TABLES)
        patch.setattr(tiles, "ORDINARY", _TABLES)
        patch.setattr(tiles, "MAX_BLOCK_R", 32)
        patch.setattr(tiles, "MAX_BOTH", 16)
        patch.setattr(tiles, "SUM_C", 16)
        patch.setattr(quantised, "WHOLE", Tile(BLOCK_M=0, BLOCK_N=32, BLOCK_K=64, BLOCK_R=0, num_warps=4, num_stages=1))
        forward_pass._frames.cache_clear()
        backward_pass._frames.cache_clear()
        yield composite
    forward_pass._frames.cache_clear()
    backward_pass._frames.cache_clear()


def results(q: judging.Problem, **kwargs) -> dict[str, torch.Tensor]:
    with interpreted(**kwargs) as backend:
        return judging.backend_results(backend, q)


SHAPES = [*judging.SHAPES[:-1], (97, 95, 93, 16)]
"""The last shape is just large enough for statistics, with dropout too: the interpreter is slow."""
VARIETY = list(itertools.product(judging.DTYPES, [0.0, 0.3]))
"""(dtypes, p). Each shape is tested with some of them. Over all shapes, every one occurs."""


@pytest.mark.parametrize("number, shape", list(enumerate(SHAPES)))
def test_results_are_right_for_every_shape(number: int, shape: tuple[int, int, int, int], poison: None) -> None:
    (dtype, adapter_dtype), p = VARIETY[3 * number % len(VARIETY)]
    q = judging.problem(
        *shape, dtype=dtype, adapter_dtype=adapter_dtype, p=p, bias=number % 3 > 0, strided=number % 2 == 0
    )
    judging.check(results(q), q)
