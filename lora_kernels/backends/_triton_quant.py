"""From a quantised weight to a launch of the Triton kernels that read it. Imported by `backends.triton` only."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from lora_kernels import quant_tables
from lora_kernels.backends._triton_launch import (
    Frame,
    Launch,
    Target,
    cdiv,
    forward_frame,
    precision_of,
    scaling,
    workspace,
)
from lora_kernels.kernels.quant import dequantise, forward_quantised
from lora_kernels.kernels.quant_tiles import WHOLE
from lora_kernels.kernels.tiles import Plan
from lora_kernels.quant import QuantizedWeight
from lora_kernels.quant_encode import FP8_BLOCK

_EXACT = {"enable_fp_fusion": False}
"""A product and a sum are two roundings, as in `QuantizedWeight.dequantize`. Says nothing of the tensor cores."""


def forward_launch(
    target: Target,
    plan: Plan,
    x: Tensor,
    w: QuantizedWeight,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    y: Tensor,
    h: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    save_h: bool,
) -> Launch:
    """`plan` is a redundant one. y is written, and h [M,R] if `save_h`."""
    strides = (*x.stride(), *a.stride(), *b.stride(), None if bias is None else bias.stride(0))
    frame = _forward_frame(
        target.arch,
        target.multiprocessors,
        plan,
        precision_of(x.dtype),
        *x.shape,
        *b.shape,
        strides,
        p,
        seed is not None,
        save_h,
    )
    sync, part = workspace(x.device, target, frame.counters, frame.floats)
    arguments = {
        **frame.arguments,
        **_weight(w, plan.tile.BLOCK_K),
        "x": x,
        "a": a,
        "b": b,
        "bias": y if bias is None else bias,
        "y": y,
        "h": h,
        "seed": y if seed is None else seed,
        "sync": sync,
        "part": part,
        **scaling(scale, b.shape[1]),
    }
    return Launch(frame.kernel, frame.programs, arguments, frame.options)


@functools.lru_cache(maxsize=4096)
def _forward_frame(
    arch: str,
    multiprocessors: int,
    plan: Plan,
    precision: str,
    M: int,
    K: int,
    N: int,
    R: int,
    strides: tuple[int | None, ...],
    p: float,
    dropout: bool,
    save_h: bool,
) -> Frame:
    """As of a dense w, less what describes one."""
    assert plan.redundant and not plan.tile.tma
    of_w = {"stride_wn": 0, "stride_wk": 0, "TMA": False}
    strides = (*strides[:2], of_w["stride_wn"], of_w["stride_wk"], *strides[2:])
    frame = forward_frame(arch, multiprocessors, plan, precision, M, K, N, R, strides, p, dropout, save_h)
    arguments = {name: value for name, value in frame.arguments.items() if name not in of_w}
    return frame._replace(kernel=forward_quantised, arguments=arguments, options=frame.options | _EXACT)


def dequantise_launch(w: QuantizedWeight, out: Tensor) -> Launch:
    """out [N,K], contiguous and of any floating dtype, is written."""
    N, K = w.shape
    tile = WHOLE
    arguments = {**_weight(w, tile.BLOCK_K), "w": out, "N": N, "K": K, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | _EXACT
    return Launch(dequantise, cdiv(N, tile.BLOCK_N) * cdiv(K, tile.BLOCK_K), arguments, options)


def dense(w: QuantizedWeight, dtype: torch.dtype, fill: bool = True) -> Tensor:
    """W [N,K] in `dtype`, on the current device and stream; not `fill`: room for it, which nobody will read.

    It is the caller's for one call, from torch's caching allocator, which gives the next layer the same memory: one W
    to a stream, and none is kept that the model could use. A graph that is being captured has it in its own pool.
    """
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    if fill:
        dequantise_launch(w, out).run()
    return out


def _weight(w: QuantizedWeight, BLOCK_K: int) -> dict[str, Any]:
    """The arguments that stand for w, in every kernel that reads one in tiles of BLOCK_K columns."""
    K, four_bit = w.shape[1], w.format in quant_tables.LEVELS
    by_block = w.format == "fp8" and w.scales.shape not in ((1, 1), (w.shape[0], 1))
    blocksize = w.blocksize if four_bit else FP8_BLOCK if by_block else 0
    if four_bit:
        # Blocks straddle rows unless they divide K.
        span = math.gcd(K, blocksize, BLOCK_K)
    else:
        span = min(blocksize or BLOCK_K, BLOCK_K)
    # What a format has not is not touched, but a kernel has one type per argument.
    nested = w.nested or (w.scales,) * 3
    return {
        "codes": w.codes.view(torch.uint8) if w.format == "fp8" else w.codes,
        "levels": quant_tables.levels(w.format, w.device) if four_bit else w.scales,
        "scales": w.scales,
        **dict(zip(("table", "absmax", "offset"), nested, strict=True)),
        "stride_cn": w.codes.shape[1],
        "stride_sn": w.scales.shape[1] if by_block else int(w.scales.shape[0] > 1),
        "SPAN": span,
        "FORMAT": w.format,
        "BLOCKSIZE": blocksize,
        "NESTED": w.nested is not None,
    }
