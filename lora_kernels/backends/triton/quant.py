"""A quantised w as the Triton kernels take it: as codes, or dequantised by a launch of its own."""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.device import Frame, Launch, cdiv
from lora_kernels.backends.triton.kernels.quant import Codes, dequantise
from lora_kernels.plans.quant_tiles import WHOLE
from lora_kernels.plans.tiles import Plan, Tile
from lora_kernels.quant import tables as quant_tables
from lora_kernels.quant.encode import FP8_BLOCK
from lora_kernels.quant.weight import QuantizedWeight


def options_of(tile: Tile, dequantises: bool) -> dict[str, int]:
    """Return the compiler's options for a launch.

    A kernel that dequantises is compiled without contraction, so that a product and a sum are two roundings, as in
    `QuantizedWeight.dequantize`. This does not change what the tensor cores do.
    """
    exact = {"enable_fp_fusion": False} if dequantises else {}
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **exact}


def as_planned(w: Tensor | QuantizedWeight, plan: Plan, dtype: torch.dtype) -> Tensor | QuantizedWeight:
    """Return w as a launch of the plan takes it: dequantised in `dtype`, unless the product itself dequantises it."""
    return w if isinstance(w, Tensor) or plan.within else dense(w, dtype)


def dequantise_launch(w: QuantizedWeight, out: Tensor) -> Launch:
    """Return the launch that writes w to out [N, K], contiguous and of any floating dtype."""
    return _dequantise_frame(*w.shape, w.codes.stride(0)).launch(w=codes(w, WHOLE.BLOCK_K), out=out)


@functools.lru_cache(maxsize=256)
def _dequantise_frame(N: int, K: int, stride: int) -> Frame:
    tile = WHOLE
    arguments = {"stride_cn": stride, "N": N, "K": K, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K}
    return Frame(dequantise, cdiv(N, tile.BLOCK_N) * cdiv(K, tile.BLOCK_K), arguments, options_of(tile, True))


def dense(w: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return w [N, K] in `dtype`, written on the current device and stream.

    The caller uses it for one call and drops it: torch's caching allocator gives the next layer the same memory. So a
    stream holds one dense W at a time, and keeps none that the model could use. A graph that is being captured has it
    in its own pool.
    """
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    dequantise_launch(w, out).run()
    return out


def codes(w: QuantizedWeight, BLOCK_K: int) -> Codes:
    """Return w as an argument of the kernels that read it in tiles of BLOCK_K columns."""
    w.refuse_changed()
    K, four_bit = w.shape[1], w.format in quant_tables.LEVELS
    by_block = w.format == "fp8" and w.scales.shape not in ((1, 1), (w.shape[0], 1))
    blocksize = w.blocksize if four_bit else FP8_BLOCK if by_block else 0
    if four_bit:
        # Blocks straddle rows unless they divide K.
        span = math.gcd(K, blocksize, BLOCK_K)
    else:
        span = min(blocksize or BLOCK_K, BLOCK_K)
    # The kernel does not read what a format lacks, but every argument needs a tensor of some type.
    nested = w.nested or (w.scales,) * 3
    return Codes(
        w.codes if w.format == "int8" else w.codes.view(torch.uint8),
        quant_tables.levels(w.format, w.device) if four_bit else w.scales,
        w.scales,
        *nested,
        stride_sn=w.scales.shape[1] if by_block else int(w.scales.shape[0] > 1),
        SPAN=_constant(span),
        FORMAT=_constant(w.format),
        BLOCKSIZE=_constant(blocksize),
        NESTED=_constant(w.nested is not None),
    )


@functools.lru_cache(maxsize=256, typed=True)
def _constant(value: str | int) -> tl.constexpr:
    return tl.constexpr(value)
