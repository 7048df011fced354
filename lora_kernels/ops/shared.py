"""`shared_lora_linear`: a linear layer whose A and B belong to many layers, and two vectors to itself.

    forward    h = x̂ Aᵀ      B' = v ⊙ B ⊙ u         y = x Wᵀ + bias + s · h B'ᵀ
    backward   D = s · dyᵀ h                        [N, R], the gradient of B'
               dv = (D ⊙ B) u      du = vᵀ (D ⊙ B)      dB = v ⊙ D ⊙ u
               g = s · dy B'       dx = dy W + c · keep ⊙ (g A)      dA = gᵀ x̂

v [N] scales the rows of B [N, R] and u [R] its columns, so that the update is s · diag(v) B diag(u) A. Both act on
[N, R] alone, and the products that have the rows of x are those of `lora_linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.core.operands import Adapter, Base, Layer, Needs
from lora_kernels.ops import direct, plain, registered
from lora_kernels.ops.autograd import (
    apply,
    as_dense,
    as_dtype,
    device_type,
    gradients_of,
    keeps_hooks,
    no_autocast,
)
from lora_kernels.ops.linear import _forward
from lora_kernels.ops.prepare import bias_beside, prepare, recorded
from lora_kernels.ops.sums import column_sum
from lora_kernels.ops.watched import watched
from lora_kernels.ops.weights import whole_weight
from lora_kernels.quant.weight import QuantizedWeight


def shared_lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_u: Tensor,
    lora_v: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return y = x Wᵀ + bias + scale · (((dropout(x) Aᵀ) ⊙ u) Bᵀ) ⊙ v, with gradients for x, A, B, u, v and bias.

    Kopiczko, Blankevoort and Asano, "VeRA: Vector-based Random Matrix Adaptation", 2023 (arXiv:2310.11454);
    Renduchintala, Konuk and Kuchaiev, "Tied-LoRA: Enhancing parameter efficiency of LoRA with weight tying", 2023
    (arXiv:2311.09578).

    Saved for the backward are x only if A needs a gradient, and h [M, R] only if B, u or v does. Nothing of M × N is
    saved: dv comes from dyᵀ h [N, R], at the price of that product, which LoRA makes for dB too. B' is formed again in
    the backward.

    Args:
        x, weight, bias, dropout_p, seed, backend: as for `lora_kernels.lora_linear`.
        lora_a: A [R, K], in x's dtype, or fp32 beside an x in 16 bits. Of a wider one the first K columns are taken.
        lora_b: B [N, R], in A's dtype. Of a taller one the first N rows are taken.
        lora_u: u [R], in A's dtype or fp32.
        lora_v: v [N], in A's dtype or fp32.
        scale: s, a finite float. VeRA has 1.

    Returns:
        y [..., N], in x's dtype, contiguous.

    Raises what `lora_kernels.lora_linear` raises, and ValueError or TypeError for a u or v that does not fit B.
    """
    lora_a, lora_b = sliced(weight, lora_a, lora_b)
    _check(lora_b, lora_u, lora_v)
    if bias is not None and isinstance(weight, QuantizedWeight) and bias.dtype != x.dtype:
        bias = bias_beside(x, bias)
    layer = Layer(weight, lora_a, lora_b, scale, bias, dropout_p, seed)
    prepared = prepare("shared_lora_linear", x, layer, backend, quantised=True)
    if prepared is None:
        whole = folded(lora_b, lora_u, lora_v)
        return plain.lora_linear(x, Layer(weight, lora_a, whole, scale, bias, dropout_p, seed))
    x, base, adapter, autocast = prepared
    rows = x.reshape(-1, x.shape[-1])
    with no_autocast(device_type(x)):
        if autocast or recorded(rows, base, adapter) or (torch.is_grad_enabled() and _trained(lora_u, lora_v)):
            y = _apply(rows, base, adapter, lora_u, lora_v, backend)
        else:
            a, b, s, p, drawn = adapter
            y, _ = _forward(rows, base, Adapter(a, folded(b, lora_u, lora_v), s, p, drawn), backend, False)
    return y.view(*x.shape[:-1], weight.shape[0])


def sliced(weight: Tensor | QuantizedWeight, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns of A and the rows of B that a layer with this weight takes: A and B themselves where it takes
    all of them."""
    N, K = weight.shape
    return a if a.shape[-1] == K else a[..., :K], b if b.shape[0] == N else b[:N]


def folded(b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return B' = v ⊙ B ⊙ u [N, R] in B's dtype, for B [N, R], u [R] and v [N]. It is computed in fp32 at least by
    differentiable operations of torch, and rounded once."""
    wide = torch.promote_types(b.dtype, torch.float32)
    return as_dtype(as_dtype(b, wide) * as_dtype(v, wide)[:, None] * as_dtype(u, wide), b.dtype)


def _trained(u: Tensor, v: Tensor) -> bool:
    return u.requires_grad or v.requires_grad


def _check(b: Tensor, u: Tensor, v: Tensor) -> None:
    """Raise ValueError or TypeError where u or v does not fit B. The rest is checked as for `lora_linear`."""
    if b.dim() != 2 or u.shape != b.shape[1:] or v.shape != b.shape[:1]:
        raise ValueError(
            f"lora_u must be [R] and lora_v [N] beside lora_b [N, R]; got {tuple(u.shape)}, {tuple(v.shape)} and "
            f"{tuple(b.shape)}"
        )
    if any(t.dtype not in (b.dtype, torch.float32) for t in (u, v)):
        raise TypeError(f"lora_u and lora_v must be in {b.dtype}, as lora_b is, or fp32; got {u.dtype} and {v.dtype}")
    if u.device != b.device or v.device != b.device:
        way = "A layer that was moved alone has left the shared factors behind: move the whole model"
        if b.is_meta:  # and u and v are where accelerate has put them for this forward
            keep = "accelerate.hooks.remove_hook_from_module(model.lora_shared)"
            way = f"If accelerate has offloaded the shared factors, keep them: {keep}"
        raise ValueError(
            f"lora_u, lora_v and lora_b must be on one device; got {u.device}, {v.device} and {b.device}. {way}"
        )


def _apply(x: Tensor, base: Base, adapter: Adapter, u: Tensor, v: Tensor, backend: str | None) -> Tensor:
    """Return y through the autograd Function. Every tensor is an argument of its own, so that autograd sees it."""
    (w, bias), (a, b, scale, p, seed) = base, adapter
    if isinstance(w, QuantizedWeight):
        how = scale, p, backend, w.format, w.blocksize
        y: Tensor = apply(SharedLinearFunction, x, w.codes, a, b, u, v, bias, seed, how, *w.tensors[1:])
        return y
    y = apply(SharedLinearFunction, x, w, a, b, u, v, bias, seed, (scale, p, backend, "dense", 0))
    return y


class SharedLinearFunction(torch.autograd.Function):
    """The autograd Function of `shared_lora_linear`. It saves x only if A needs a gradient, h [M, R] only if B, u or v
    does, the seed, and references to w, a, b, u and v. B' is not saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        u: Tensor,
        v: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        how: tuple[float, float, str | None, str, int],
        *w_scales: Tensor,
    ) -> Tensor:
        """Return y. `how` and `w_scales` are those of `LoRALinearFunction`."""
        scale, p, backend, w_format, w_blocksize = how
        _, _, need_da, need_db, need_du, need_dv, *_ = ctx.needs_input_grad
        need_d = need_db or need_du or need_dv
        base = Base(whole_weight(w, w_scales, w_format, w_blocksize, x.dtype), bias)
        y, h = _forward(x, base, Adapter(a, folded(b, u, v), scale, p, seed), backend, need_d)
        ctx.save_for_backward(x if need_da else None, w, a, b, u, v, h if need_d else None, seed, *w_scales)
        ctx.dtype, ctx.how = x.dtype, how
        return y

    @staticmethod
    @keeps_hooks
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, dA, dB, du, dv and dbias, and None for each that is not needed."""
        grads = gradients_of("shared_lora_linear", ctx, dy, _gradients)
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


def _gradients(  # type: ignore[no-untyped-def]
    ctx: Any, dy: Tensor, x, w, a, b, u, v, h, seed, *w_scales
) -> tuple[Tensor | None, ...]:
    """Return (dx, None, dA, dB, du, dv, dbias), and None for each that is not needed."""
    need_dx, _, need_da, need_db, need_du, need_dv, need_dbias, *_ = ctx.needs_input_grad
    (scale, p, backend, w_format, w_blocksize), dtype = ctx.how, ctx.dtype
    need_d = need_db or need_du or need_dv
    dy = as_dense(dy, dtype)
    dx = da = db = du = dv = None
    if need_dx or need_da or need_d:
        base = Base(whole_weight(w, w_scales, w_format, w_blocksize, dtype))
        way = registered if watched(dy, w, a, b, x) else direct
        needs = Needs(need_dx, (need_da,), (need_d,))
        dx, da, d = way.backward(dy, x, base, Adapter(a, folded(b, u, v), scale, p, seed), h, needs, backend)
    if need_d:
        assert d is not None
        wide = torch.promote_types(b.dtype, torch.float32)
        d, u_wide, v_wide = as_dtype(d, wide), as_dtype(u, wide), as_dtype(v, wide)
        if need_db:
            db = as_dtype(d * v_wide[:, None] * u_wide, b.dtype)
        if need_du or need_dv:
            scaled = d * as_dtype(b, wide)
            du = as_dtype(v_wide @ scaled, u.dtype) if need_du else None
            dv = as_dtype(scaled @ u_wide, v.dtype) if need_dv else None
    dbias = column_sum(dy) if need_dbias else None
    return dx if need_dx else None, None, da if need_da else None, db, du, dv, dbias
