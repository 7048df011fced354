"""The autograd Function of experts, and the call of a back-end in its forward.

forward    y, and h [M, R]        backward    dx, da [E, R, K], db [E, N, R], dbias [E, N]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.core.rows import Rows
from lora_kernels.ops import direct, registered_experts
from lora_kernels.ops.autograd import (
    as_dense,
    device_type,
    keeps_hooks,
    needs_plain_mode,
    no_autocast,
    no_graph,
    refuse_double_backward,
)
from lora_kernels.ops.sums import column_sum
from lora_kernels.ops.watched import watched


def forward(
    x: Tensor, base: Base, adapter: Adapter, rows: Rows, backend: str | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (y, h), through the registered operator where something observes the call. Unless `save_h`, h is None or
    has no elements."""
    way = registered_experts if watched(x, base.w, adapter.a, adapter.b, base.bias) else direct  # type: ignore[arg-type]
    return way.forward_experts(x, base, adapter, rows, backend, save_h)


class LoRALinearExpertsFunction(torch.autograd.Function):
    """The autograd Function of experts. It saves x only if A needs a gradient, h [M, R] only if B does, the rows, the
    seed, and references to w, a and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        order: Tensor,
        starts: Tensor,
        how: tuple[float, float, Rows | None, str | None],
    ) -> Tensor:
        """Return y. `how` is (scale, p, rows or None, backend)."""
        scale, p, kept, backend = how
        _, _, need_da, need_db, *_ = ctx.needs_input_grad
        rows = Rows(order, starts) if kept is None else kept
        y, h = forward(x, Base(w, bias), Adapter(a, b, scale, p, seed), rows, backend, need_db)
        if kept is not None:
            order = starts = None  # type: ignore[assignment]
        ctx.save_for_backward(x if need_da else None, w, a, b, h if need_db else None, seed, order, starts)
        ctx.how, ctx.dtype = how, x.dtype
        return y

    @staticmethod
    @keeps_hooks
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, da, db and dbias, and None for each that is not needed."""
        saved = ctx.saved_tensors  # activation checkpointing lets a backward read this only once
        if not needs_plain_mode(dy):
            grads = _gradients(ctx, dy, *saved)
        else:
            with no_graph(), no_autocast(device_type(dy)):
                grads = _gradients(ctx, dy, *saved)
            grads = refuse_double_backward("lora_linear_experts", grads, dy, *saved)
        return *grads, None, None, None, None


def _gradients(  # type: ignore[no-untyped-def]
    ctx: Any, dy: Tensor, x, w, a, b, h, seed, order, starts
) -> tuple[Tensor | None, ...]:
    """Return (dx, None, da, db, dbias), and None for each that is not needed."""
    need_dx, _, need_da, need_db, need_dbias, *_ = ctx.needs_input_grad
    scale, p, kept, backend = ctx.how
    if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(dy):  # type: ignore[attr-defined]
        raise RuntimeError(
            "lora_linear_experts takes one dy at a time: call torch.autograd.grad for each without is_grads_batched "
            "(or vectorize), or take torch.func.vjp with torch.func.vmap"
        )
    rows = Rows(order, starts) if kept is None else kept
    dy = as_dense(dy, ctx.dtype)
    dx = da = db = None
    if need_dx or need_da or need_db:
        way = registered_experts if watched(dy, w, a, b, x) else direct
        needs = Needs(need_dx, (need_da,), (need_db,))
        adapter = Adapter(a, b, scale, p, seed)
        dx, da, db = way.backward_experts(dy, x, Base(w), adapter, rows, h, needs, backend)
    dbias = _bias_gradient(dy, rows, w.shape[0]) if need_dbias else None
    return dx if need_dx else None, None, da if need_da else None, db if need_db else None, dbias


def _bias_gradient(dy: Tensor, rows: Rows, experts: int) -> Tensor:
    """Return Σ dy over the rows of each expert [E, N]."""
    if rows.known_counts is not None:
        dbias = dy.new_zeros(experts, dy.shape[1])
        for e, first, last in rows.spans():
            dbias[e] = column_sum(dy[first:last])
        return dbias
    wide = torch.promote_types(dy.dtype, torch.float32)
    starts = rows.starts.long()
    own = torch.segment_reduce(dy.to(wide), "sum", offsets=starts, axis=0, unsafe=True, initial=0.0)
    return own.to(dy.dtype)
