"""`lora_linear`: y = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ, with its autograd Function, and `explain`.

    lora_linear → prepare (autocast, checks) → LoRALinearFunction → direct or registered → a back-end
                                             → plain, where no kernel can serve the call

Outside autocast, a call that needs no gradient goes past the Function. A call that nothing observes goes past the
registered operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Adapter, Base, Layer, Needs, call_of
from lora_kernels.ops import check, direct, plain, registered
from lora_kernels.ops.autograd import (
    apply,
    as_dense,
    device_type,
    keeps_hooks,
    needs_plain_mode,
    no_autocast,
    no_graph,
    refuse_double_backward,
)
from lora_kernels.ops.prepare import bias_beside, prepare, recorded
from lora_kernels.ops.sums import column_sum
from lora_kernels.ops.watched import watched
from lora_kernels.ops.weights import whole_weight
from lora_kernels.quant.weight import QuantizedWeight


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return y = x Wᵀ + bias + scale · (dropout(x) Aᵀ) Bᵀ, in one call, with gradients for x, A, B and bias. W is
    frozen.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685).

    Args:
        x: [..., K], fp64, fp32, fp16 or bf16. M is the product of its leading dimensions, 0 included. A nested, sparse
            or MKL-DNN x is computed in plain torch operations.
        weight: W [N, K], in x's dtype; must not require a gradient. Or a `QuantizedWeight` of 4 or 8 bits, beside an x
            of any dtype. It is dequantised in pieces, within the products. On a GPU it is dequantised as a whole,
            into memory that is free again after the call, unless `triton` serves a call of few rows of x.
        lora_a: A [R, K], in x's dtype, or fp32 beside an fp16 or bf16 x (its gradient is then fp32, not rounded through
            x's dtype).
        lora_b: B [N, R], in A's dtype.
        scale: s, α/R for plain LoRA and α/√R for rsLoRA; finite. A tensor of one element on a GPU, or one that
            wants a gradient, stays on its device: s·B is then formed in B's dtype. The value of any other is read.
        bias: [N], in x's dtype. Beside a `QuantizedWeight` it may have another dtype, as in bitsandbytes' layers. It is
            then converted to x's.
        dropout_p: p in [0, 1): the probability with which an element of x is dropped in the low-rank branch. Applied
            whenever it is above 0; there is no training flag here.
        seed: the seed of the mask, an int in [0, 2⁶³) or an int64 tensor of one element on x's device. Where it is
            None, one is drawn from torch's generator of x's device. The mask is a function of (seed, row, column), the
            same in every back-end.
        backend: the name of a back-end, which then serves the call or raises; None for the automatic choice (see
            `explain`).

    Under autocast x, weight and bias are converted to its dtype, and fp32 A and B are left as they are.

    Calls that torch.jit.trace or torch.export records, and those inside a transform of torch.func or with tangents of
    forward-mode AD, are computed in plain torch operations: see `lora_kernels.ops.plain`.

    Returns:
        y [..., N], in x's dtype, contiguous.

    Raises:
        TypeError: for dtypes other than the above, or a `seed` or `scale` that is no number.
        ValueError: for shapes that do not fit together, operands on different devices, a weight that requires a
            gradient, p outside [0, 1), a scale that is not finite, or a named back-end that is unknown or cannot serve
            the call (with all its reasons), a seed in a call that is recorded.
        RuntimeError: from autograd, on double backward; for a named back-end in the transforms of torch.func that
            differentiate.
    """
    if bias is not None and isinstance(weight, QuantizedWeight) and bias.dtype != x.dtype:
        bias = bias_beside(x, bias)
    layer = Layer(weight, lora_a, lora_b, scale, bias, dropout_p, seed)
    prepared = prepare("lora_linear", x, layer, backend, quantised=True)
    if prepared is None:
        return plain.lora_linear(x, layer)
    x, base, adapter, autocast = prepared
    flat = x.dim() == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    if autocast:
        with no_autocast(x.device.type):
            y = _apply(rows, base, adapter, backend)
    elif recorded(rows, base, adapter):
        y = _apply(rows, base, adapter, backend)
    else:
        y, _ = _forward(rows, base, adapter, backend, False)
    return y if flat else y.view(*x.shape[:-1], weight.shape[0])


def explain(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> dispatch.Explanation:
    """Return which back-end `lora_linear` would run for these operands, and every reason why the others would not be
    chosen. The layer is not computed. On a GPU the check at the first use of `composite` may run.

    The arguments are those of `lora_linear` without scale and seed, and the same errors are raised.
    """
    if bias is not None and isinstance(weight, QuantizedWeight) and bias.dtype != x.dtype:
        bias = bias_beside(x, bias)
    layer = Layer(weight, lora_a, lora_b, 1.0, bias, dropout_p)
    check.operands(x, layer, isinstance(weight, QuantizedWeight))
    if isinstance(weight, Tensor) and weight.requires_grad:
        weight = check.frozen(weight)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    call = call_of("forward", rows, Base(weight, bias), Adapter(lora_a, lora_b, 1.0, dropout_p))
    return dispatch.explain(call, backend)


def _apply(x: Tensor, base: Base, adapter: Adapter, backend: str | None) -> Tensor:
    """Return y through the autograd Function. Every tensor is an argument of its own, so that autograd sees it."""
    (w, bias), (a, b, scale, p, seed) = base, adapter
    if isinstance(w, QuantizedWeight):
        how = scale, p, backend, w.format, w.blocksize
        return apply(LoRALinearFunction, x, w.codes, a, b, bias, seed, how, *w.tensors[1:])
    return apply(LoRALinearFunction, x, w, a, b, bias, seed, (scale, p, backend, "dense", 0))


class LoRALinearFunction(torch.autograd.Function):
    """LoRA's autograd Function. It saves x only if A needs a gradient, h [M, R] only if B does, the seed, and
    references to w, a and b. No mask and no x̂ are saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        how: tuple[float, float, str | None, str, int],
        *w_scales: Tensor,
    ) -> Tensor:
        """Return y.

        `how` is (scale, p, backend, w_format, w_blocksize). It is one argument, because torch takes time for each. A
        quantised weight comes as its codes `w` and its other tensors `w_scales`.
        """
        scale, p, backend, w_format, w_blocksize = how
        _, _, need_da, need_db, *_ = ctx.needs_input_grad
        # Under autocast w comes in its own dtype and is converted here and again in the backward, so that no copy of it
        # is saved.
        dense = w_format == "dense" and w.dtype == x.dtype
        weight = w if dense else whole_weight(w, w_scales, w_format, w_blocksize, x.dtype)
        y, h = _forward(x, Base(weight, bias), Adapter(a, b, scale, p, seed), backend, need_db)
        ctx.save_for_backward(x if need_da else None, w, a, b, h if need_db else None, seed, *w_scales)
        ctx.dtype, ctx.how = x.dtype, how
        return y

    @staticmethod
    @keeps_hooks
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, da, db and dbias, and None for each that is not needed."""
        saved = ctx.saved_tensors  # activation checkpointing lets a backward read this only once
        if needs_plain_mode(dy):
            with no_graph(), no_autocast(device_type(dy)):
                grads = _gradients(ctx, dy, *saved)
            grads = refuse_double_backward("lora_linear", grads, dy, *saved)
        else:
            grads = _gradients(ctx, dy, *saved)
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


def _forward(
    x: Tensor, base: Base, adapter: Adapter, backend: str | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (y, h), through the registered operator where something observes the call. Unless `save_h`, h is None or
    has no elements."""
    w, bias = base
    codes = w.codes if isinstance(w, QuantizedWeight) else w
    way = registered if watched(x, codes, adapter.a, adapter.b, bias) else direct
    return way.forward(x, base, adapter, backend, save_h)


def _gradients(  # type: ignore[no-untyped-def]
    ctx: Any, dy: Tensor, x, w, a, b, h, seed, *w_scales
) -> tuple[Tensor | None, ...]:
    """Return (dx, None, da, db, dbias), and None for each that is not needed."""
    need_dx, _, need_da, need_db, need_dbias, *_ = ctx.needs_input_grad
    (scale, p, backend, w_format, w_blocksize), dtype = ctx.how, ctx.dtype
    if dy.dtype != dtype or (not torch.compiler.is_compiling() and dy.is_sparse):
        dy = as_dense(dy, dtype)
    dx = da = db = None
    if need_dx or need_da or need_db:
        dense = w_format == "dense" and w.dtype == dtype
        base = Base(w if dense else whole_weight(w, w_scales, w_format, w_blocksize, dtype))
        way = registered if watched(dy, w, a, b, x) else direct
        needs = Needs(need_dx, (need_da,), (need_db,))
        dx, da, db = way.backward(dy, x, base, Adapter(a, b, scale, p, seed), h, needs, backend)
    dbias = column_sum(dy) if need_dbias else None
    return dx if need_dx else None, None, da if need_da else None, db if need_db else None, dbias
