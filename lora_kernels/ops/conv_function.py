"""The autograd Functions of a convolution with LoRA, made of torch's convolutions.

    y  = x ∗ W + bias + s·B h,  h = x̂ ∗ A                    ∗ convolves; B is a 1×1 kernel; x̂ = c·keep ⊙ x
    dx = (dy ∗ᵀ W) + c·keep ⊙ (dh ∗ᵀ A)                      dh = s·Bᵀ dy
    dA = Σ x̂ dh over the positions of the kernel             dB = s·Σ dy h

There are two ways. The folded one convolves with W' = W + s·B A alone, and W' is computed again in the backward. It is
taken where W' holds all digits of the update and is small beside x: see `may_fold`. The other way convolves with W and
with A, and adds s·B h to y in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.core import dropout
from lora_kernels.ops.autograd import (
    as_dense,
    as_dtype,
    device_type,
    gradients_of,
    keeps_hooks,
    no_autocast,
    no_graph,
    refuse_double_backward,
)
from lora_kernels.ops.conv_mask import keep_mask
from lora_kernels.ops.conv_rows import lies_by_rows
from lora_kernels.ops.conv_window import Window
from lora_kernels.ops.watched import watched

_FOLD_FROM = 1024
"""The number of positions of y, over the whole batch, from which computing W' costs less than it saves."""
_SMALL, _SMALL_WITH_DROPOUT = 4, 16
"""h is saved where this number of h has at most x's elements; otherwise it is computed again. With dropout x̂ is made
again in any case."""


class How(NamedTuple):
    """What a call has beside tensors."""

    window: Window
    scale: float
    p: float
    backend: str | None
    """The back-end that draws the mask."""
    by_rows: bool
    """Whether x lay by rows before it was padded."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_rounded(device: str) -> bool:
    """Return whether torch may round the operands of a convolution in fp32 to fewer digits: to TF32 on a GPU, and on a
    CPU where the user has allowed it."""
    settings: Any = getattr(torch.backends.mkldnn, "conv", None)  # torch 2.8 and before round nothing on a CPU
    return device != "cpu" or getattr(settings, "fp32_precision", "none") in ("bf16", "tf32")


def may_fold(x: Tensor, w: Tensor, a: Tensor, p: float, window: Window) -> bool:
    """Return whether a call of a padded x may be folded: without dropout, in fp32 or fp64 (in 16 bits and in TF32, W'
    would round the update away), where A sees the channels that W sees, and y has enough positions."""
    return (
        p == 0
        and x.dtype == a.dtype
        and x.dtype in (torch.float32, torch.float64)
        and a.shape[1] == w.shape[1]
        and _positions(x, w, window) >= _FOLD_FROM
        and not _is_rounded(device_type(x))
    )


def folded(w: Tensor, a: Tensor, b: Tensor, scale: float, groups: int) -> Tensor:
    """Return W' = W + scale·B A, group by group, in W's shape."""
    N, R, g = w.shape[0], a.shape[0], groups
    flat = w.reshape(g, N // g, -1), b.reshape(g, N // g, R // g), a.reshape(g, R // g, -1)
    return torch.baddbmm(*flat, alpha=scale).view(w.shape)


class LoRAConvFunction(torch.autograd.Function):
    """The convolution of a padded x with W and LoRA, or of LoRA alone where w is None.

    It saves x only if A needs a gradient, or B does and h is not saved; h [B, R, ...] only if B needs a gradient and
    either A does not or h is small; the seed, and references to w, a and b. No mask, no x̂ and no W' is saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor | None,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        how: How,
    ) -> Tensor:
        """Return y in x's dtype; the low-rank half alone is in A's."""
        window, scale, groups = how.window, how.scale, _groups_of(a, how.window, x)
        _, _, need_da, need_db, *_ = ctx.needs_input_grad
        h = None
        fold = False
        if w is not None:
            w_now = as_dtype(w, x.dtype)  # under autocast; converted again in the backward, so that no copy is saved
            fold = may_fold(x, w, a, how.p, window)
            y = window.convolve(x, folded(w_now, a, b, scale, window.groups) if fold else w_now, bias)
        if not fold or (need_db and not need_da):
            h = window.convolve(_x_hat(x, a.dtype, how, seed), a, None, groups)
        if w is None:
            assert h is not None
            y = window.pointwise().convolve(h, b * (scale * _factor(how)))
        elif not fold:
            y = _add_up(y, h, b, scale * _factor(how), window)
        small = _SMALL_WITH_DROPOUT if how.p > 0 else _SMALL
        keeps_h = need_db and h is not None and (not need_da or h.numel() * small <= x.numel())
        needs_x = need_da or (need_db and not keeps_h)
        ctx.save_for_backward(x if needs_x else None, w, a, b, h if keeps_h else None, seed)
        ctx.how, ctx.fold, ctx.dtype, ctx.shape = how, fold, x.dtype, x.shape
        return y

    @staticmethod
    @keeps_hooks
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, da, db and dbias, and None for each that is not needed."""
        grads = gradients_of("lora_conv", ctx, dy, _gradients)
        return *grads, None, None


def _gradients(  # type: ignore[no-untyped-def]
    ctx: Any, dy: Tensor, x, w, a, b, h, seed
) -> tuple[Tensor | None, ...]:
    """Return (dx, None, da, db, dbias), and None for each that is not needed."""
    need_dx, _, need_da, need_db, need_dbias, *_ = ctx.needs_input_grad
    how, fold, dtype = ctx.how, ctx.fold, ctx.dtype
    window = how.window
    dy = as_dense(dy, a.dtype if w is None else dtype)
    like = x if x is not None else dy.new_empty(1).expand(ctx.shape)  # for its shape
    groups = _groups_of(a, window, like)
    keep = None
    if how.p > 0 and (need_dx or need_da or (need_db and h is None)):
        keep = keep_mask(as_dtype(like, dtype), window, how.by_rows, how.p, seed, how.backend)
    x_hat = None
    if need_da or (need_db and h is None):
        x_hat = as_dtype(x if keep is None else keep * x, a.dtype)
    dh = db = da = dx = None
    need_dh = need_da or (need_dx and not fold)
    if need_dh or need_db:
        if h is None:
            h = window.convolve(x_hat, a, None, groups) if need_db else _like_h(dy, a)
        s = how.scale * _factor(how)
        dh, db = window.pointwise().gradients(as_dtype(dy, a.dtype), h, b * s, need_dh, need_db)
        db = None if db is None else db * s  # what came is the gradient of s·B
    if need_da or (need_dx and not fold):
        rest = x_hat if x_hat is not None else as_dtype(like, a.dtype)
        dx, da = window.gradients(dh, rest, a, need_dx and not fold, need_da, groups)
    if need_dx:
        if fold:
            dx, _ = window.gradients(dy, like, folded(w, a, b, how.scale, window.groups), True, False)
        else:
            assert dx is not None
            dx = as_dtype(dx, dtype)
            if keep is not None:
                dx = dx.mul_(keep)
            if w is not None:
                base, _ = window.gradients(dy, as_dtype(like, dtype), as_dtype(w, dtype), True, False)
                assert base is not None
                dx = base.add_(dx)
    dbias = dy.sum((0, *range(2, dy.dim()))) if need_dbias else None
    return dx, None, da, db, dbias


class MaskedConvFunction(torch.autograd.Function):
    """x̂ ∗ W of a padded x and a frozen W. It saves the seed and a reference to w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, seed: Tensor, how: How) -> Tensor:
        """Return u."""
        ctx.save_for_backward(w, seed)
        ctx.how, ctx.dtype, ctx.shape = how, x.dtype, x.shape
        return how.window.convolve(_x_hat(x, x.dtype, how, seed), as_dtype(w, x.dtype)) * _factor(how)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx."""
        w, seed = ctx.saved_tensors
        how = ctx.how
        with no_graph(), no_autocast(device_type(dy)):
            dy = as_dense(dy, ctx.dtype)
            like = dy.new_empty(1).expand(ctx.shape)
            dx, _ = how.window.gradients(dy, like, as_dtype(w, ctx.dtype), True, False)
            assert dx is not None
            dx.mul_(keep_mask(dx, how.window, how.by_rows, how.p, seed, how.backend)).mul_(_factor(how))
        return *refuse_double_backward("lora_conv", (dx,), dy, w), None, None, None


def _factor(how: How) -> float:
    """Return c, by which what is kept is multiplied."""
    return dropout.rescale(how.p) if how.p > 0 else 1.0


def _x_hat(x: Tensor, dtype: torch.dtype, how: How, seed: Tensor | None) -> Tensor:
    """Return keep ⊙ x in `dtype`. The factor c goes with the scale."""
    if how.p > 0:
        assert seed is not None
        x = keep_mask(x, how.window, how.by_rows, how.p, seed, how.backend).mul_(x)
    return as_dtype(x, dtype)


def _groups_of(a: Tensor, window: Window, x: Tensor) -> int:
    """Return the number of groups in which A convolves: 1, or that of W."""
    return 1 if a.shape[1] == x.shape[1] else window.groups


def _positions(x: Tensor, w: Tensor, window: Window) -> int:
    """Return the number of positions of y, over the whole batch."""
    total = x.shape[0]
    for size, k, s, pad, d in zip(
        x.shape[2:], w.shape[2:], window.stride, window.padding, window.dilation, strict=True
    ):
        total *= (size + 2 * pad - d * (k - 1) - 1) // s + 1
    return total


def _like_h(dy: Tensor, a: Tensor) -> Tensor:
    """Return a tensor of h's shape, whose values do not count."""
    return a.new_empty(1).expand(dy.shape[0], a.shape[0], *dy.shape[2:])


def _add_up(y: Tensor, h: Tensor | None, b: Tensor, s: float, window: Window) -> Tensor:
    """Return y + s·B h, written into y [B, N, ...] unless something observes the call."""
    assert h is not None
    if y.dtype != h.dtype:  # the sum is rounded once; y + low would be slow in channels_last, because of its two dtypes
        return window.pointwise().convolve(h, b * s).add_(y).to(y.dtype)
    if window.groups > 1 or not (y.is_contiguous() or lies_by_rows(y)):
        return y.add_(window.pointwise().convolve(h, b), alpha=s)
    rank, N = h.shape[1], y.shape[1]
    observed = watched(y, h, b, b, None)  # torch's counter of FLOPs has no formula for the functions that write into y
    if lies_by_rows(y):
        into, rest = y.movedim(1, -1).view(-1, N), (h.movedim(1, -1).reshape(-1, rank), b.view(N, rank).t())
        if observed:
            return torch.addmm(into, *rest, alpha=s).view(y.movedim(1, -1).shape).movedim(-1, 1)
        into.addmm_(*rest, alpha=s)
    else:
        into, rest = y.flatten(2), (b.view(1, N, rank).expand(y.shape[0], -1, -1), h.flatten(2))
        if observed:
            return torch.baddbmm(into, *rest, alpha=s).view(y.shape)
        into.baddbmm_(*rest, alpha=s)
    return y
