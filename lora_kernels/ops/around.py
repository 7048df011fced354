"""`add_low_rank`: the low-rank half of a LoRA layer, added to what any other base has computed.

    forward    h = x̂ Aᵀ,  x̂ = dropout(x, p)       y ← y + s · h Bᵀ, in place where nothing else needs the old y
    backward   g = s · dy B                         dx = c · keep ⊙ (g A)
               da = gᵀ x̂       db = s · dyᵀ h       dy goes on to the base unchanged

`lora_linear` is faster where the base is one that it knows. A base with a forward of its own, such as a layer of a
quantiser, computes its product and the gradient of x itself. Of the adapter's forward only x and h [M, R] are saved, no
mask and no x̂.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.backends import dispatch
from lora_kernels.core import dropout
from lora_kernels.core.dropout import draw_seed
from lora_kernels.core.operands import Adapter, Call, Needs, power_of_two
from lora_kernels.ops import check, registered
from lora_kernels.ops.autograd import (
    apply,
    as_dense,
    autocast_of,
    device_type,
    gradients_of,
    keeps_hooks,
    no_autocast,
    outlived,
)
from lora_kernels.ops.watched import watched

_KEEP_NO_OUTPUT = frozenset(
    {
        "AddBackward0",
        "AddmmBackward0",
        "MmBackward0",
        "ToCopyBackward0",
        "FP8LinearFunctionBackward",
        "HQQMatmulNoCacheDeqBackward",
        "HQQMatmulCachedDeqBackward",
        "HQQMatmulNoCacheMulBackward",
    }
)
"""The nodes of autograd that save no result, so that it may be written to."""


def add_low_rank(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float | Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return y + scale · (dropout(x) Aᵀ) Bᵀ in y's dtype, with gradients for y, x, A and B.

    y is written to, and returned, where autograd keeps neither y nor a view of it for another backward. Else it stays
    as it is. Under autocast x is converted to its dtype.

    Args:
        y: [..., N], of any floating dtype: what the base has computed.
        x: [..., K], fp64, fp32, fp16 or bf16.
        lora_a, lora_b: A [R, K] and B [N, R], in x's dtype, or fp32 beside an x in 16 bits. Beside another x they are
            in the dtype to which x is converted.
        scale, dropout_p, seed, backend: as for `lora_kernels.lora_linear`. Where the automatic choice has no kernel for
            the half alone, as on a GPU, `eager` serves the call.

    Raises:
        ValueError: shapes that do not fit together, p outside [0, 1), a scale that is not finite, a named back-end that
            cannot serve the call.
        TypeError: dtypes other than the above.
        RuntimeError: from autograd, on double backward.
    """
    _check(y, x, lora_a, lora_b, dropout_p)
    if (autocast := autocast_of(x)) is not None:
        x = x.to(autocast)
        if lora_a.dtype != torch.float32:
            lora_a, lora_b = lora_a.to(autocast), lora_b.to(autocast)
    if lora_a.dtype != x.dtype and not (lora_a.dtype == torch.float32 and x.dtype in check.HALVES):
        x = x.to(lora_a.dtype)
    s, lora_b = check.scale(scale, lora_b)
    drawn = None
    if dropout_p > 0:
        drawn = draw_seed(x.device) if seed is None else check.seed(seed, x.device)
    adapter = Adapter(lora_a, lora_b, s, dropout_p, drawn)
    with no_autocast(device_type(x)):
        if watched(x, y, lora_a, lora_b, None):
            return _plain(y, x, adapter, backend)
        in_place = may_be_written(y, x)
        graph = torch.is_grad_enabled() and (
            y.requires_grad or x.requires_grad or lora_a.requires_grad or lora_b.requires_grad
        )
        if not graph and not outlived(y, x, lora_a, lora_b):
            return _sum(y, x, adapter, backend, in_place, False)[0]
        return apply(_AddLowRank, y, x, lora_a, lora_b, drawn, (s, dropout_p, backend, in_place))


def may_be_written(y: Tensor, x: Tensor) -> bool:
    """Return whether y, the result of a base over x, can be written to: no view, no leaf of autograd, not x's own
    memory, contiguous, and the result of an operator that saves no result."""
    if y._is_view() or not y.is_contiguous() or y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return False
    if y.grad_fn is None:
        return not y.requires_grad and y.is_inference() == torch.is_inference_mode_enabled()
    return y.grad_fn.name() in _KEEP_NO_OUTPUT


def _plain(y: Tensor, x: Tensor, adapter: Adapter, backend: str | None) -> Tensor:
    """Return the sum in torch operations that autograd, compilers and modes see."""
    a, b, scale, p, seed = adapter
    if p > 0 and seed is not None:
        rows = x.reshape(-1, x.shape[-1])
        keep = registered.keep_mask(rows.detach(), p, seed, backend).view(x.shape)
        x = x * keep * dropout.rescale(p)
    return y + (F.linear(F.linear(x.to(a.dtype), a), b) * scale).to(y.dtype)


def _sum(
    y: Tensor, x: Tensor, adapter: Adapter, backend: str | None, in_place: bool, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (the sum, h), where y itself is the sum with `in_place`. h is None unless `save_h`."""
    rows = x.reshape(-1, x.shape[-1])
    out = y if in_place else y.clone(memory_format=torch.contiguous_format)
    part = out if out.dtype == x.dtype else x.new_zeros(out.shape)
    kernels = kernels_for("forward", rows, adapter, backend)
    h = kernels.add_low_rank(part.view(-1, adapter.b.shape[0]), rows, adapter, save_h)
    if part is not out:
        out.add_(part)
    return out, h


class _AddLowRank(torch.autograd.Function):
    """The autograd Function of `add_low_rank`. It saves x only if A needs a gradient, h [M, R] only if B does, the seed
    and references to A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        seed: Tensor | None,
        how: tuple[float, float, str | None, bool],
    ) -> Tensor:
        """Return the sum. `how` is (scale, p, backend, whether y may be written to)."""
        scale, p, backend, in_place = how
        _, _, need_da, need_db, *_ = ctx.needs_input_grad
        out, h = _sum(y, x, Adapter(a, b, scale, p, seed), backend, in_place, need_db)
        if in_place:
            ctx.mark_dirty(y)
        ctx.save_for_backward(x if need_da else None, a, b, h if need_db else None, seed)
        ctx.how, ctx.shape, ctx.dtype = how, x.shape, x.dtype
        return out

    @staticmethod
    @keeps_hooks
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dy itself, dx, da and db, and None for each that is not needed."""
        return *gradients_of("add_low_rank", ctx, dy, _gradients), None, None


def _gradients(
    ctx: Any, dy: Tensor, x: Tensor | None, a: Tensor, b: Tensor, h: Tensor | None, seed: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return (dy, dx, da, db), and None for each that is not needed."""
    need_dy, need_dx, need_da, need_db, *_ = ctx.needs_input_grad
    scale, p, backend, _ = ctx.how
    dx = da = db = None
    if need_dx or need_da or need_db:
        adapter = Adapter(a, b, scale, p, seed)
        rows = as_dense(dy, ctx.dtype).reshape(-1, b.shape[0])
        flat = None if x is None else x.reshape(-1, a.shape[1])
        needs = Needs(need_dx, (need_da,), (need_db,))
        kernels = kernels_for("backward", rows, adapter, backend)
        dx, da, db = kernels.low_rank_backward(rows, flat, adapter, h, needs)
    return dy if need_dy else None, None if dx is None else dx.view(ctx.shape), da, db


def kernels_for(op: str, rows: Tensor, adapter: Adapter, backend: str | None) -> Any:
    """Return the back-end that serves a layer of these sizes, or `eager` where the automatic choice has no kernel for
    the half alone. Raises ValueError where the named one has none."""
    (R, K), N, M = adapter.a.shape, adapter.b.shape[0], power_of_two(rows.shape[0])
    call = Call(op, rows.device, rows.dtype, adapter.a.dtype, M, N, K, R, adapter.p > 0)
    module = dispatch.pick(call, backend)
    if hasattr(module, "add_low_rank"):
        return module
    if backend is not None:
        raise ValueError(
            f"backend={backend!r} has no kernel for the low-rank half alone, which a base with a forward of its own "
            "needs: pass backend=None"
        )
    return dispatch.load("eager")


def _check(y: Tensor, x: Tensor, a: Tensor, b: Tensor, p: float) -> None:
    """Raise TypeError or ValueError where the operands do not fit together."""
    shapes = f"y {tuple(y.shape)}, x {tuple(x.shape)}, A {tuple(a.shape)}, B {tuple(b.shape)}"
    if not (a.dim() == b.dim() == 2 and x.dim() and x.shape[-1] == a.shape[1] and a.shape[0] == b.shape[1] > 0):
        raise ValueError(f"x must be [..., K], A [R, K], B [N, R]; got {shapes}")
    if y.shape != (*x.shape[:-1], b.shape[0]):
        raise ValueError(f"y must have the rows of x and N features; got {shapes}")
    if x.dtype not in check.DTYPES or a.dtype not in check.DTYPES or a.dtype != b.dtype or not y.is_floating_point():
        raise TypeError(
            f"operands must be floating, A and B of one dtype; got {y.dtype}, {x.dtype}, {a.dtype}, {b.dtype}"
        )
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {p}")
