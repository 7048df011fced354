"""From tensors to a launch of the Triton kernels: the arguments and the grid. Imported by `backends.triton` only."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.backends.triton import quant as quantised
from lora_kernels.backends.triton.device import Launch, Target, cdiv, workspace
from lora_kernels.backends.triton.kernels.backward import backward
from lora_kernels.backends.triton.kernels.forward import forward_redundant, forward_tickets
from lora_kernels.core import dropout as random
from lora_kernels.plans.tiles import Plan, Tile
from lora_kernels.quant.weight import QuantizedWeight

PROGRAMS_PER_MULTIPROCESSOR = 2
"""How many programs are launched to claim tickets. More than fit at once only find that no work is left."""


class Frame(NamedTuple):
    """What launches of one kind of call have in common."""

    kernel: Any
    programs: int
    counters: int
    floats: int
    """What they want of the workspace."""
    arguments: dict[str, Any]
    """All but the tensors and what depends on the scale."""
    options: dict[str, int]


def forward_launch(
    target: Target,
    plan: Plan,
    x: Tensor,
    w: Tensor | QuantizedWeight,
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
    """y and h are written. h is room for [M,R] whether or not it is kept, except in a redundant plan, which writes it
    if `save_h`. A quantised w takes a plan that has it within."""
    tile = plan.tile
    strides = (*x.stride(), *_stored(w).stride(), *a.stride(), *b.stride(), None if bias is None else bias.stride(0))
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
        "x": _described(x, tile.BLOCK_M, tile.BLOCK_K) if tile.tma else x,
        "w": _weight(w, tile),
        "a": a,
        "b": b,
        "bias": y if bias is None else bias,
        "y": y,
        "h": h,
        "seed": y if seed is None else seed,
        "sync": sync,
        **scaling(scale, b.shape[1]),
    }
    if plan.redundant:
        arguments["part"] = part
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
    tile = plan.tile
    BLOCK_R = tile.block_r(R)
    rows, cols, chunks = cdiv(M, tile.BLOCK_M), cdiv(N, tile.BLOCK_N), cdiv(R, BLOCK_R)
    names = ("xm", "xk", "wn", "wk", "ar", "ak", "bn", "br", "bias")
    arguments: dict[str, Any] = {
        **{f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)},
        "M": M,
        "N": N,
        "K": K,
        "R": R,
        "c": random.rescale(p),
        "T": random.threshold(p),
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": tile.BLOCK_K,
        "BLOCK_R": BLOCK_R,
        "GROUP_M": tile.GROUP_M,
        "HAS_BIAS": strides[-1] is not None,
        "DROPOUT": dropout,
        "TMA": tile.tma,
        "W": "codes" if plan.within else "tma" if tile.tma else "",
        "PRECISION": precision,
        "AMD": arch.startswith("gfx"),
    }
    if strides[-1] is None:
        arguments["stride_bias"] = 1
    options = quantised.options_of(tile, plan.within)
    if not plan.redundant:
        programs = min(rows * (chunks + cols), PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
        return Frame(forward_tickets, programs, 1 + rows, 0, arguments, options)
    steps = max(1, cdiv(K, plan.split * tile.BLOCK_K))
    splits = max(1, cdiv(K, steps * tile.BLOCK_K))
    floats = rows * cols * splits * tile.BLOCK_M * (tile.BLOCK_N + BLOCK_R) if splits > 1 else 0
    arguments |= {"steps": steps, "SAVE_H": save_h, "SPLIT": splits > 1}
    return Frame(forward_redundant, rows * cols * splits, rows * cols, floats, arguments, options)


def backward_launch(
    target: Target,
    plan: Plan,
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | QuantizedWeight,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    g: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> Launch:
    """Those of dx, da and db are written that are not None; g is room for [M,R]. A quantised w takes a plan that has it
    within."""
    tile = plan.tile
    # What is not needed is not touched, but a kernel has one type per argument.
    x = dy if x is None else x
    h = g if h is None else h
    strides = (*dy.stride(), *x.stride(), *_stored(w).stride(), *a.stride(), *b.stride(), *h.stride())
    needs = (dx is not None, da is not None, db is not None)
    frame = _backward_frame(
        target.arch,
        target.multiprocessors,
        plan,
        precision_of(dy.dtype),
        *dy.shape,
        *a.shape,
        strides,
        p,
        seed is not None,
        needs,
    )
    sync, part = workspace(dy.device, target, frame.counters, frame.floats)
    arguments = {
        **frame.arguments,
        "dy": dy,
        "dy_rows": _described(dy, tile.BLOCK_M, tile.BLOCK_N) if tile.tma else dy,
        "x": x,
        "w": _weight(w, tile),
        "a": a,
        "b": b,
        "h": h,
        "g": g,
        "dx": g if dx is None else dx,
        "da": a if da is None else da,
        "db": b if db is None else db,
        "seed": g if seed is None else seed,
        "sync": sync,
        "part": part,
        "scale": scale,
    }
    return Launch(frame.kernel, frame.programs, arguments, frame.options)


@functools.lru_cache(maxsize=4096)
def _backward_frame(
    arch: str,
    multiprocessors: int,
    plan: Plan,
    precision: str,
    M: int,
    N: int,
    R: int,
    K: int,
    strides: tuple[int, ...],
    p: float,
    dropout: bool,
    needs: tuple[bool, bool, bool],
) -> Frame:
    tile = plan.tile
    need_dx, need_da, need_db = needs
    BLOCK_R = tile.block_r(R)
    rows, chunks = cdiv(M, tile.BLOCK_M), cdiv(R, BLOCK_R)
    blocks = max(1, cdiv(rows, plan.split))
    splits = max(1, cdiv(rows, blocks))
    tiles_da, tiles_db = need_da * cdiv(K, tile.BLOCK_C) * chunks, need_db * cdiv(N, tile.BLOCK_C) * chunks
    tiles_dx, tiles_g = need_dx * rows * cdiv(K, tile.BLOCK_K), (need_dx or need_da) * rows * chunks
    names = ("dym", "dyn", "xm", "xk", "wn", "wk", "ar", "ak", "bn", "br", "hm", "hr")
    arguments: dict[str, Any] = {
        **{f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)},
        "M": M,
        "N": N,
        "K": K,
        "R": R,
        "c": random.rescale(p),
        "T": random.threshold(p),
        "splits": splits,
        "blocks": blocks,
        "need_dx": int(need_dx),
        "need_da": int(need_da),
        "need_db": int(need_db),
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": tile.BLOCK_K,
        "BLOCK_R": BLOCK_R,
        "BLOCK_C": tile.BLOCK_C,
        "BLOCK_T": tile.BLOCK_T,
        "GROUP_M": tile.GROUP_M,
        "DROPOUT": dropout,
        "TMA": tile.tma,
        "W": "codes" if plan.within else "tma" if tile.tma else "",
        "PRECISION": precision,
        "AMD": arch.startswith("gfx"),
    }
    items = tiles_g + tiles_dx + (tiles_da + tiles_db) * splits
    return Frame(
        backward,
        programs=min(items, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors),
        counters=1 + rows + tiles_da + tiles_db,
        floats=(tiles_da + tiles_db) * splits * tile.BLOCK_C * BLOCK_R,
        arguments=arguments,
        options=quantised.options_of(tile, plan.within),
    )


def _stored(w: Tensor | QuantizedWeight) -> Tensor:
    """What of w has rows and columns in memory."""
    return w.codes if isinstance(w, QuantizedWeight) else w


def _weight(w: Tensor | QuantizedWeight, tile: Tile) -> Any:
    """w as the kernels take it."""
    if isinstance(w, QuantizedWeight):
        return quantised.codes(w, tile.BLOCK_K)
    return _described(w, tile.BLOCK_N, tile.BLOCK_K) if tile.tma else w


def aligned(rows: Tensor, w: Tensor | QuantizedWeight) -> bool:
    """Whether descriptors can be made of x or dy and of w, which is dequantised first if it is quantised."""
    if isinstance(w, QuantizedWeight):
        N, K = w.shape
        return describable(rows) and N > 0 and K > 0 and (K * rows.element_size()) % 16 == 0
    return describable(rows, w)


def describable(*operands: Tensor) -> bool:
    """Whether tensor-map descriptors can be made of these matrices: not empty, unit last stride, rows and base at
    multiples of 16 bytes."""
    return all(
        t.stride(1) == 1
        and t.stride(0) > 0
        and t.numel() > 0
        and (t.stride(0) * t.element_size()) % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in operands
    )


def _described(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols])


def scaling(scale: float, R: int) -> dict[str, float | int]:
    """A scale below 2⁻¹⁰⁰ counts as 0: its inverse would overflow the fp32 accumulators that it multiplies."""
    if abs(scale) < 2.0**-100:
        return {"scale": 1.0, "inverse": 1.0, "R_up": 0}
    return {"scale": scale, "inverse": 1.0 / scale, "R_up": R}


def precision_of(dtype: torch.dtype) -> str:
    """ "ieee" or "tf32", by ``torch.get_float32_matmul_precision()``. Means nothing for 16-bit operands."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
