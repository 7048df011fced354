"""From tensors to a launch of the Triton kernels: the arguments and the grid."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.backends.triton import quant as quantised
from lora_kernels.backends.triton.device import Frame, Launch, Target, cdiv, workspace
from lora_kernels.backends.triton.kernels.backward import backward
from lora_kernels.backends.triton.kernels.forward import forward_redundant, forward_tickets
from lora_kernels.backends.triton.kernels.mask import dropout_mask
from lora_kernels.core.dropout import rescale, threshold
from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.plans.tiles import Gpu, Plan, Tile
from lora_kernels.quant.weight import QuantizedWeight

PROGRAMS_PER_MULTIPROCESSOR = 2
"""The number of programs that are launched to claim tickets. More than fit at once only find that no work is left."""

MASK = Tile(BLOCK_M=8, BLOCK_N=0, BLOCK_K=128, BLOCK_R=0, num_warps=4, num_stages=1)
"""The tile of the kernel that writes the dropout mask: each thread draws one group of eight elements."""


class Outputs(NamedTuple):
    """The tensors that a forward writes."""

    y: Tensor
    h: Tensor
    """[M, R]. A plan by tickets always writes it, as scratch; a redundant one only with `save_h`."""
    save_h: bool


class Saved(NamedTuple):
    """The tensors that a backward reads of its forward. None where no gradient needs them."""

    x: Tensor | None
    h: Tensor | None


class GradientBuffers(NamedTuple):
    """The tensors that a backward writes. None where a gradient is not wanted."""

    dx: Tensor | None
    da: Tensor | None
    db: Tensor | None
    g: Tensor
    """[M, R], scratch."""

    @property
    def needs(self) -> Needs:
        """Which gradients are wanted."""
        return Needs(self.dx is not None, (self.da is not None,), (self.db is not None,))


class Layout(NamedTuple):
    """What the constant arguments of a launch depend on beside the GPU and the plan. It is hashable."""

    M: int
    N: int
    K: int
    R: int
    strides: tuple[int | None, ...]
    """The strides of every operand, in the order of the kernel's arguments; None for a bias that is not there."""
    precision: str
    p: float
    dropout: bool


class Parts(NamedTuple):
    """The part of a launch that all calls of one layout share, and the workspace that it needs."""

    frame: Frame
    counters: int
    """The number of int32 counters."""
    floats: int
    """The number of fp32 partial sums."""


def forward_launch(target: Target, plan: Plan, x: Tensor, base: Base, adapter: Adapter, out: Outputs) -> Launch:
    """Return the launch of a forward that writes y and h. A quantised w needs a plan with `within`."""
    (w, bias), (a, b, scale, p, seed), tile = base, adapter, plan.tile
    strides = (*x.stride(), *_stored(w).stride(), *a.stride(), *b.stride(), None if bias is None else bias.stride(0))
    (M, K), (N, R) = x.shape, b.shape
    layout = Layout(M, N, K, R, strides, precision_of(a.dtype), p, seed is not None)
    frame, counters, floats = _forward_frame(target.gpu, plan, layout, out.save_h)
    sync, part = workspace(x.device, target, counters, floats)
    others = {
        "x": _described(x, tile.BLOCK_M, tile.BLOCK_K) if tile.tma else x,
        "w": _weight(w, tile),
        "a": a,
        "b": b,
        "bias": out.y if bias is None else bias,
        "y": out.y,
        "h": out.h,
        "seed": out.y if seed is None else seed,
        "sync": sync,
        **scaling(scale, R),
    }
    if plan.redundant:
        others["part"] = part
    return frame.launch(**others)


@functools.lru_cache(maxsize=4096)
def _forward_frame(gpu: Gpu, plan: Plan, layout: Layout, save_h: bool) -> Parts:
    tile, (M, N, K, R, strides, *_) = plan.tile, layout
    BLOCK_R = tile.block_r(R)
    rows, cols, chunks = cdiv(M, tile.BLOCK_M), cdiv(N, tile.BLOCK_N), cdiv(R, BLOCK_R)
    names = ("xm", "xk", "wn", "wk", "ar", "ak", "bn", "br", "bias")
    has_bias = strides[-1] is not None
    arguments = _arguments(plan, layout, names) | {"HAS_BIAS": has_bias}
    if not has_bias:
        arguments["stride_bias"] = 1
    options = quantised.options_of(tile, plan.within)
    if not plan.redundant:
        programs = min(rows * (chunks + cols), PROGRAMS_PER_MULTIPROCESSOR * gpu.multiprocessors)
        return Parts(Frame(forward_tickets, programs, arguments, options), 1 + rows, 0)
    steps = max(1, cdiv(K, plan.split * tile.BLOCK_K))
    splits = max(1, cdiv(K, steps * tile.BLOCK_K))
    floats = rows * cols * splits * tile.BLOCK_M * (tile.BLOCK_N + BLOCK_R) if splits > 1 else 0
    arguments |= {"steps": steps, "SAVE_H": save_h, "SPLIT": splits > 1}
    return Parts(Frame(forward_redundant, rows * cols * splits, arguments, options), rows * cols, floats)


def backward_launch(
    target: Target, plan: Plan, dy: Tensor, saved: Saved, base: Base, adapter: Adapter, out: GradientBuffers
) -> Launch:
    """Return the launch of a backward that writes the gradients in `out` that are not None. A quantised w needs a plan
    with `within`."""
    w, (a, b, scale, p, seed), tile, g = base.w, adapter, plan.tile, out.g
    # The kernel does not read what no gradient needs, but every argument needs a tensor of the right type.
    x = dy if saved.x is None else saved.x
    h = g if saved.h is None else saved.h
    strides = (*dy.stride(), *x.stride(), *_stored(w).stride(), *a.stride(), *b.stride(), *h.stride())
    (M, N), (R, K) = dy.shape, a.shape
    layout = Layout(M, N, K, R, strides, precision_of(a.dtype), p, seed is not None)
    frame, counters, floats = _backward_frame(target.gpu, plan, layout, out.needs)
    sync, part = workspace(dy.device, target, counters, floats)
    others = {
        "dy": dy,
        "dy_rows": _described(dy, tile.BLOCK_M, tile.BLOCK_N) if tile.tma else dy,
        "x": x,
        "w": _weight(w, tile),
        "a": a,
        "b": b,
        "h": h,
        "g": g,
        "dx": g if out.dx is None else out.dx,
        "da": a if out.da is None else out.da,
        "db": b if out.db is None else out.db,
        "seed": g if seed is None else seed,
        "sync": sync,
        "part": part,
        "scale": scale,
    }
    return frame.launch(**others)


@functools.lru_cache(maxsize=4096)
def _backward_frame(gpu: Gpu, plan: Plan, layout: Layout, needs: Needs) -> Parts:
    tile, (M, N, K, R, *_) = plan.tile, layout
    need_dx, (need_da,), (need_db,) = needs
    BLOCK_R = tile.block_r(R)
    rows, chunks = cdiv(M, tile.BLOCK_M), cdiv(R, BLOCK_R)
    blocks = max(1, cdiv(rows, plan.split))
    splits = max(1, cdiv(rows, blocks))
    tiles_da, tiles_db = need_da * cdiv(K, tile.BLOCK_C) * chunks, need_db * cdiv(N, tile.BLOCK_C) * chunks
    tiles_dx, tiles_g = need_dx * rows * cdiv(K, tile.BLOCK_K), (need_dx or need_da) * rows * chunks
    items = tiles_g + tiles_dx + (tiles_da + tiles_db) * splits
    names = ("dym", "dyn", "xm", "xk", "wn", "wk", "ar", "ak", "bn", "br", "hm", "hr")
    arguments = _arguments(plan, layout, names) | {
        "splits": splits,
        "blocks": blocks,
        "need_dx": int(need_dx),
        "need_da": int(need_da),
        "need_db": int(need_db),
        "BLOCK_C": tile.BLOCK_C,
        "BLOCK_T": tile.BLOCK_T,
    }
    programs = min(items, PROGRAMS_PER_MULTIPROCESSOR * gpu.multiprocessors)
    return Parts(
        Frame(backward, programs, arguments, quantised.options_of(tile, plan.within)),
        counters=1 + rows + tiles_da + tiles_db,
        floats=(tiles_da + tiles_db) * splits * tile.BLOCK_C * BLOCK_R,
    )


def _arguments(plan: Plan, layout: Layout, strides: tuple[str, ...]) -> dict[str, Any]:
    """Return the constant arguments that every kernel takes; `strides` names those of the operands."""
    tile = plan.tile
    return {
        **{f"stride_{name}": stride for name, stride in zip(strides, layout.strides, strict=True)},
        "M": layout.M,
        "N": layout.N,
        "K": layout.K,
        "R": layout.R,
        "c": rescale(layout.p),
        "T": threshold(layout.p),
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": tile.BLOCK_K,
        "BLOCK_R": tile.block_r(layout.R),
        "GROUP_M": tile.GROUP_M,
        "DROPOUT": layout.dropout,
        "W": "codes" if plan.within else "tma" if tile.tma else "",
        "PRECISION": layout.precision,
    }


def mask_launch(out: Tensor, p: float, seed: Tensor) -> Launch:
    """Return the launch that writes the dropout mask to out [M, K], contiguous, as 0 and 1."""
    return _mask_frame(*out.shape, threshold(p)).launch(out=out, seed=seed)


@functools.lru_cache(maxsize=256)
def _mask_frame(M: int, K: int, T: int) -> Frame:
    arguments = {"M": M, "K": K, "T": T, "BLOCK_M": MASK.BLOCK_M, "BLOCK_K": MASK.BLOCK_K}
    programs = cdiv(M, MASK.BLOCK_M) * cdiv(K, MASK.BLOCK_K)
    return Frame(dropout_mask, programs, arguments, quantised.options_of(MASK, False))


def _stored(w: Tensor | QuantizedWeight) -> Tensor:
    """Return the tensor whose strides are those of w: w, or the codes of a quantised w."""
    return w.codes if isinstance(w, QuantizedWeight) else w


def _weight(w: Tensor | QuantizedWeight, tile: Tile) -> Any:
    """Return w as the kernels take it: a pointer, a descriptor or codes."""
    if isinstance(w, QuantizedWeight):
        return quantised.codes(w, tile.BLOCK_K)
    return _described(w, tile.BLOCK_N, tile.BLOCK_K) if tile.tma else w


def aligned(rows: Tensor, w: Tensor | QuantizedWeight) -> bool:
    """Return whether tensor-map descriptors can be made of `rows` (x or dy) and of w, dequantised if it is
    quantised."""
    if isinstance(w, QuantizedWeight):
        N, K = w.shape
        return describable(rows) and N > 0 and K > 0 and (K * rows.element_size()) % 16 == 0
    return describable(rows, w)


def describable(*operands: Tensor) -> bool:
    """Return whether tensor-map descriptors can be made of these matrices: none is empty, the last stride is 1, and
    rows and base lie at multiples of 16 bytes."""
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
    """Return the forward kernels' arguments that depend on the scale.

    A scale below 2⁻¹⁰⁰ counts as 0, because its inverse would overflow the fp32 accumulators that it multiplies.
    """
    if abs(scale) < 2.0**-100:
        return {"scale": 1.0, "inverse": 1.0, "R_up": 0}
    return {"scale": scale, "inverse": 1.0 / scale, "R_up": R}


def precision_of(dtype: torch.dtype) -> str:
    """Return "ieee" or "tf32", by ``torch.get_float32_matmul_precision()``. 16-bit operands ignore it."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
