"""`dora_linear`: weight-decomposed LoRA (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024,
arXiv:2402.09353), from the calls that `lora_linear` makes.

    n = ‖W + s·B A‖ by rows, a constant for autograd          d = m / n
    p = 0:  z = x Wᵀ + s·h Bᵀ,  h = x Aᵀ                      y = d ⊙ z + bias
            in 16 bits with fp32 A and B: u = x Wᵀ            y = d ⊙ u + s·h B'ᵀ + bias
    p > 0:  u = x̂ Wᵀ,  B' = d ⊙ B,  h = x̂ Aᵀ                  y = x Wᵀ + bias + s·h B'ᵀ + (d - 1) ⊙ u

In 16 bits z, and u where p = 0, include the bias, and (1 - d) ⊙ bias is added in its place, because x Wᵀ + bias may
fit where x Wᵀ overflows. What is elementwise is computed in fp32 there and rounded once. Beside fp32 A and B, s·h B'ᵀ
is not rounded before that either, as in PEFT: a z in 16 bits would cost m's gradient digits.

A W in 4 or 8 bits stands in these lines as it is dequantised. Its products are those of `lora_linear`, which never has
the whole W in memory on a CPU, and its norm is computed from the codes.

Dropout acts on all that DoRA adds to the base, so with dropout each direction takes a second base GEMM.

The gradient to m needs Σₘ dy ⊙ z (or u), so z or u is saved beside LoRA's x and h. The other ways cost more.
Σₘ dy ⊙ (x Wᵀ) = rowsum((dyᵀ x) ⊙ W) is a GEMM of the base's size, and so is computing z again. z = (y - bias) / d is
inexact, fails for d = 0, and would break where y is later changed in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.core import dropout
from lora_kernels.core.operands import Adapter, Base, Layer, Needs
from lora_kernels.ops import check, direct, plain, registered
from lora_kernels.ops.autograd import (
    apply,
    as_dense,
    gradients_of,
    keeps_hooks,
    no_autocast,
    outlived,
)
from lora_kernels.ops.dora_norm import ratio, weight_norm
from lora_kernels.ops.dora_passes import add_low_rank, add_scaled, column_dot, excess, scaled_rows
from lora_kernels.ops.prepare import bias_beside, prepare
from lora_kernels.ops.sums import column_sum
from lora_kernels.ops.watched import watched
from lora_kernels.ops.weights import whole_weight
from lora_kernels.quant.weight import QuantizedWeight

Update = tuple[Tensor, Tensor, float | Tensor]
"""(A, B, scale) of a low-rank update scale·B A."""


def dora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    norm_of: Update | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return y = x Wᵀ + bias + (d - 1) ⊙ (x̂ Wᵀ) + d ⊙ scale·(x̂ Aᵀ) Bᵀ with d = m / ‖W + scale·B A‖ by rows and
    x̂ = dropout(x), with gradients for x, A, B, m and bias. W is frozen, and the norm is a constant for autograd.

    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024 (arXiv:2402.09353), section 4.3.

    Args:
        x, weight, lora_a, lora_b, scale, bias, dropout_p, seed, backend: as for `lora_linear`. The norm of a
            `QuantizedWeight` is that of the W that its codes stand for, not rounded to x's dtype.
        magnitude: m [N], in A's dtype or fp32 (fp64 beside an fp64 A). The norm is rounded to m's dtype, so that
            m = `weight_norm` gives d = 1 exactly.
        norm_of: the (A, B, scale) in the norm, where they are not `lora_a`, `lora_b` and `scale`: a part of them, if
            the low-rank terms of other adapters are scaled by d too.

    Returns:
        y [..., N], in x's dtype, contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as `lora_linear`; TypeError for a magnitude of another dtype, ValueError
            for a magnitude that is not [N] on x's device.
    """
    if bias is not None and isinstance(weight, QuantizedWeight) and bias.dtype != x.dtype:
        bias = bias_beside(x, bias)
    layer = Layer(weight, lora_a, lora_b, scale, bias, dropout_p, seed)
    prepared = prepare("dora_linear", x, layer, backend, quantised=True)
    if prepared is None:
        if not plain.is_tracing():  # a trace warns of comparisons of sizes
            _check_magnitude(weight, lora_a, magnitude)
        return plain.dora_linear(x, layer, magnitude, norm_of)
    x, base, adapter, autocast = prepared
    if autocast and magnitude.dtype in check.HALVES:
        magnitude = magnitude.to(adapter.a.dtype)
    _check_magnitude(weight, adapter.a, magnitude)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if autocast:
        with no_autocast(x.device.type):
            y = _apply(rows, base, adapter, magnitude, norm_of, backend)
    else:
        y = _apply(rows, base, adapter, magnitude, norm_of, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _apply(
    x: Tensor, base: Base, adapter: Adapter, magnitude: Tensor, norm_of: Update | None, backend: str | None
) -> Tensor:
    """Return y, through the autograd Function where one may be needed."""
    (w, bias), (a, b, scale, p, seed) = base, adapter
    if norm_of is None:
        norm = weight_norm(w, a, b, scale, magnitude)
    else:
        a_in, b_in, given = norm_of
        scale_in, b_in = check.scale(given, b_in)
        norm = weight_norm(w, a_in, b_in, scale_in, magnitude)
    d = ratio(magnitude, norm)
    if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and outlived(x, w, a, b, d, bias)):
        if isinstance(w, QuantizedWeight):
            how = scale, p, backend, w.format, w.blocksize
            return apply(DoRALinearFunction, x, w.codes, a, b, d, bias, seed, how, *w.tensors[1:])
        return apply(DoRALinearFunction, x, w, a, b, d, bias, seed, (scale, p, backend, "dense", 0))
    return _forward(x, base, adapter, d, backend, False, False)[0]


class DoRALinearFunction(torch.autograd.Function):
    """DoRA's autograd Function.

    It saves x only if A needs a gradient, h [M, R] only if B does (with dropout, and with fp32 adapters beside 16 bits,
    also if d does), z or u [M, N] only if d does, the seed, and references to w, a, b and d. No mask and no x̂ are
    saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        d: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        how: tuple[float, float, str | None, str, int],
        *w_scales: Tensor,
    ) -> Tensor:
        """Return y. `how` is (scale, p, backend, w_format, w_blocksize). A quantised weight comes as its codes `w` and
        its other tensors `w_scales`."""
        scale, p, backend, w_format, w_blocksize = how
        _, _, need_da, need_db, need_dd, *_ = ctx.needs_input_grad
        save_h = need_db or (need_dd and (p > 0 or a.dtype != x.dtype))
        # Under autocast w is converted here and again in the backward, so that no copy of it is saved.
        dense = w_format == "dense" and w.dtype == x.dtype
        weight = w if dense else whole_weight(w, w_scales, w_format, w_blocksize, x.dtype)
        y, h, z = _forward(x, Base(weight, bias), Adapter(a, b, scale, p, seed), d, backend, save_h, need_dd)
        within_z = bias if need_dd and p == 0 and x.dtype in check.HALVES else None
        ctx.save_for_backward(
            x if need_da else None, w, a, b, d, h if save_h else None, z if need_dd else None, seed, within_z, *w_scales
        )
        ctx.dtype, ctx.how = x.dtype, how
        return y

    @staticmethod
    @keeps_hooks
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, da, db, dd and dbias, and None for each that is not needed."""
        grads = gradients_of("dora_linear", ctx, dy, _gradients)
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


def _forward(
    x: Tensor, base: Base, adapter: Adapter, d: Tensor, backend: str | None, save_h: bool, save_z: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (y, h, z or u).

    Results that are not to be saved are changed in place, except under a compiler. Where the result of a Function was
    changed in place, the code that torch 2.11 makes gives gradients of zero. A compiler fuses the sums anyway.
    """
    (w, bias), (a, b, scale, p, seed) = base, adapter
    if isinstance(w, Tensor) and w.dtype != x.dtype:  # without gradients, under autocast
        w = w.to(x.dtype)
    codes = w if isinstance(w, Tensor) else w.codes
    compiling = torch.compiler.is_compiling()
    if p == 0:
        way = registered if watched(x, codes, a, b, None) else direct
        if a.dtype != x.dtype:
            u = way.base_gemm(x, w, backend, bias, a.dtype)
            addend = None if bias is None else (1 - d) * bias
            y, h = add_low_rank(addend, u, d, x, a, scaled_rows(b, d) * scale)
            return y, h, u
        if x.dtype in check.HALVES:
            z, h = way.forward(x, Base(w, bias), adapter, backend, save_h)
            return add_scaled(None if bias is None else (1 - d) * bias, z, d, None if save_z else z), h, z
        z, h = way.forward(x, Base(w), adapter, backend, save_h)
        factor = d.to(x.dtype)
        y = z * factor if save_z or compiling else z.mul_(factor)
        if bias is not None:
            y = y + bias if compiling else y.add_(bias)
        return y, h, z
    assert seed is not None
    scaled = Adapter(a, scaled_rows(b, d), scale, p, seed)
    way = registered if watched(x, codes, a, scaled.b, bias) else direct
    y, h = way.forward(x, Base(w, bias), scaled, backend, save_h)
    u = way.base_gemm(way.keep_mask(x, p, seed, backend).mul_(x), w, backend)  # x̂ = c·keep ⊙ x: c goes with d - 1
    if x.dtype in check.HALVES:
        return add_scaled(y, u, (d - 1) * dropout.rescale(p), y), h, u
    factor = excess(d, p, x.dtype)
    rest = u * factor if save_z else u.mul_(factor)
    return y + rest if compiling else y.add_(rest), h, u


class _Saved(NamedTuple):
    """The tensors that the forward saves for the backward, with the weight put together again."""

    x: Tensor | None
    w: Tensor | QuantizedWeight
    a: Tensor
    b: Tensor
    d: Tensor
    h: Tensor | None
    z: Tensor | None
    """z, or u with dropout or fp32 adapters."""
    seed: Tensor | None
    bias: Tensor | None
    """[N], where z includes it and d needs a gradient."""


_OTHERS = len(_Saved._fields) - 2
"""The number of saved tensors between w and the scales of a quantised weight."""


def _gradients(ctx: Any, dy: Tensor, x: Any, w: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    """Return (dx, None, da, db, dd, dbias), and None for each that is not needed."""
    scale, p, backend, w_format, w_blocksize = ctx.how
    others, w_scales = rest[:_OTHERS], rest[_OTHERS:]
    # torch 2.6 cannot trace NamedTuple._replace, so w is converted before the tuple is made.
    saved = _Saved(x, whole_weight(w, w_scales, w_format, w_blocksize, ctx.dtype), *others)
    need_dx, _, need_da, need_db, need_dd, need_dbias, *_ = ctx.needs_input_grad
    dy = as_dense(dy, ctx.dtype)
    needs, adapter = Needs(need_dx, (need_da,), (need_db,)), Adapter(saved.a, saved.b, scale, p, saved.seed)
    if not (need_dx or need_da or need_db or need_dd):
        dx = da = db = dd = None
    else:
        run = _backward_dropout if p > 0 else _backward
        dx, da, db, dd = run(dy, saved, adapter, needs, need_dd, backend)
    dbias = column_sum(dy) if need_dbias else None
    return (
        dx if need_dx else None, None, da if need_da else None, db if need_db else None, dd if need_dd else None, dbias,
    )  # fmt: skip


def _backward(
    dy: Tensor, saved: _Saved, adapter: Adapter, needs: Needs, need_dd: bool, backend: str | None
) -> tuple[Tensor | None, ...]:
    """Return (dx, da, db, dd) without dropout."""
    x, w, a, b, d, h, z, _, bias = saved
    dx = da = db = dd = None
    if dy.dtype != a.dtype and (needs.da[0] or needs.db[0] or need_dd):
        # The gradients of fp32 adapters come from dy and B' = d ⊙ B, because d ⊙ dy would be rounded to 16 bits.
        scaled = adapter._replace(b=scaled_rows(b, d))
        some = Needs(False, needs.da, (needs.db[0] or need_dd,))
        _, da, low = _way(dy, w, scaled, x).backward(dy, x, Base(w), scaled, h, some, backend)
        if need_dd:  # Σₘ dy ⊙ (u + s·h Bᵀ), where s·dyᵀ h is `low`
            dd = ((low * b).sum(1, dtype=d.dtype) + column_dot(dy, z, bias)).to(d.dtype)
        db = scaled_rows(low, d) if needs.db[0] else None
        needs = Needs(needs.dx, (False,), (False,))
    elif need_dd:
        dd = column_dot(dy, z, bias).to(d.dtype)
    if needs.dx or needs.da[0] or needs.db[0]:
        dz = dy * d.to(dy.dtype)
        dx, *others = _way(dz, w, adapter, x).backward(dz, x, Base(w), adapter, h, needs, backend)
        if needs.da[0] or needs.db[0]:
            da, db = others
    return dx, da, db, dd


def _backward_dropout(
    dy: Tensor, saved: _Saved, adapter: Adapter, needs: Needs, need_dd: bool, backend: str | None
) -> tuple[Tensor | None, ...]:
    """Return (dx, da, db, dd) with dropout. The back-end computes the layer of B' = d ⊙ B, and returns the gradient of
    B'."""
    x, w, a, b, d, h, u, seed, _ = saved
    scale, p = adapter.scale, adapter.p
    scaled = Adapter(a, scaled_rows(b, d), scale, p, seed)
    way, need_db = _way(dy, w, scaled, x), needs.db[0]
    dx, da, low = way.backward(dy, x, Base(w), scaled, h, Needs(needs.dx, needs.da, (need_db or need_dd,)), backend)
    db = dd = None
    if need_dd:  # Σₘ dy ⊙ (c·u + s·h Bᵀ), where s·dyᵀ h is `low`
        dd = torch.add((low * b).sum(1, dtype=d.dtype), column_dot(dy, u), alpha=dropout.rescale(p)).to(d.dtype)
    if need_db:
        db = scaled_rows(low, d)
    if needs.dx:
        part = way.base_gemm(dy * excess(d, p, dy.dtype), w, backend, transposed=True)
        dx += part.mul_(way.keep_mask(part, p, seed, backend))
    return dx, da, db, dd


def _way(dy: Tensor, w: Tensor | QuantizedWeight, adapter: Adapter, x: Tensor | None) -> Any:
    """Return `direct`, or `registered` where something observes the backward."""
    codes = w.codes if isinstance(w, QuantizedWeight) else w
    return registered if watched(dy, codes, adapter.a, adapter.b, x) else direct


def _check_magnitude(w: Tensor | QuantizedWeight, a: Tensor, magnitude: Tensor) -> None:
    """Raise ValueError where m is not [N] on W's device, TypeError where it has a dtype that is refused."""
    if magnitude.shape != w.shape[:1] or magnitude.device != w.device:
        raise ValueError(
            f"magnitude must be [N], a number for each row of weight {tuple(w.shape)} on {w.device}; "
            f"got {tuple(magnitude.shape)} on {magnitude.device}"
        )
    if magnitude.dtype not in (a.dtype, torch.float32) or (a.dtype == torch.float64 != magnitude.dtype):
        raise TypeError(f"magnitude must have lora_a's dtype ({a.dtype}), or fp32; got {magnitude.dtype}")
