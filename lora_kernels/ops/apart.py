"""`lora_linear_apart`: a LoRA layer over a quantised W whose base is computed in another dtype than its adapter.

    forward    c = x in `dtype`        y  = to x's dtype(c Wᵀ + bias) + s · (x̂ Aᵀ) Bᵀ        x̂ = dropout(x, p)
    backward   e = dy in `dtype`       dx = to x's dtype(e W) + c · keep ⊙ (g A)             g = s · dy B
               da = gᵀ x̂              db = s · dyᵀ h                                        dbias = Σ_m e

It is what bitsandbytes' Linear4bit does with an x that is not in its compute_dtype: the base has x rounded to it, and
the adapter has all bits of x. `lora_linear` is faster where one dtype serves both. The base's backward needs W only, so
it saves no x and no dequantised W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.core.dropout import draw_seed
from lora_kernels.core.operands import Adapter
from lora_kernels.ops import check, direct, plain, registered
from lora_kernels.ops.around import add_low_rank, kernels_for
from lora_kernels.ops.autograd import (
    apply,
    as_dense,
    device_type,
    gradients_of,
    keeps_hooks,
    no_autocast,
    outlived,
)
from lora_kernels.ops.sums import column_sum
from lora_kernels.ops.watched import watched
from lora_kernels.ops.weights import whole_weight
from lora_kernels.quant.weight import QuantizedWeight


def lora_linear_apart(
    x: Tensor,
    weight: QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    dtype: torch.dtype,
    scale: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Return y = (x in `dtype`) Wᵀ + bias + scale · (dropout(x) Aᵀ) Bᵀ in x's dtype, with gradients for x, A, B, bias.

    It is computed as it is, whatever autocast asks for.

    Args:
        x: [..., K], fp32, fp16 or bf16.
        weight: W [N, K] in 4 or 8 bits, dequantised in pieces within the product where a kernel does so.
        lora_a, lora_b: A [R, K] and B [N, R], in x's dtype, or fp32 beside an x in 16 bits.
        dtype: fp16 or bf16, in which the base is computed.
        scale, dropout_p, backend: as for `lora_kernels.lora_linear`.
        bias: [N], in `dtype`.
    """
    with no_autocast(device_type(x)):
        trained = x.requires_grad or lora_a.requires_grad or lora_b.requires_grad
        graph = torch.is_grad_enabled() and (trained or (bias is not None and bias.requires_grad))
        if (
            graph
            or type(scale) is not float
            or watched(x, weight.codes, lora_a, lora_b, bias)
            or outlived(x, lora_a, lora_b, bias)
        ):
            y = _base(x.to(dtype), weight, bias, backend).to(x.dtype)
            return add_low_rank(y, x, lora_a, lora_b, scale=scale, dropout_p=dropout_p, backend=backend)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        seed = draw_seed(x.device) if dropout_p > 0 else None
        adapter = Adapter(lora_a, lora_b, check.scale(scale, lora_b)[0], dropout_p, seed)
        y = direct.base_gemm(rows.to(dtype), weight, backend, bias).to(x.dtype)
        kernels_for("forward", rows, adapter, backend).add_low_rank(y, rows, adapter, False)
        return y if rows is x else y.view(*x.shape[:-1], y.shape[1])


def _base(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, backend: str | None) -> Tensor:
    """Return x Wᵀ + bias [..., N] in x's dtype, with gradients for x and bias."""
    recording = plain.is_exporting() if torch.compiler.is_compiling() else torch._C._is_tracing()
    if recording or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return F.linear(x, plain.dense_weight(weight, x.dtype), bias)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    how = weight.format, weight.blocksize, backend
    y: Tensor = apply(_Base, rows, weight.codes, bias, how, *weight.tensors[1:])
    return y.view(*x.shape[:-1], weight.shape[0])


def _product(x: Tensor, w: Any, backend: str | None, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """Return x Wᵀ + bias, or x W where `transposed`, through the registered operator where something observes it."""
    codes = w.codes
    way = registered if watched(x, codes, codes, codes, bias) else direct
    return way.base_gemm(x, w, backend, bias, transposed=transposed)


class _Base(torch.autograd.Function):
    """The autograd Function of the base product. It saves references to the codes and the scales."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, bias: Tensor | None, how: tuple[str, int, str | None], *scales: Tensor
    ) -> Tensor:
        """Return y. `how` is (w_format, w_blocksize, backend)."""
        w_format, blocksize, backend = how
        ctx.save_for_backward(codes, *scales)
        ctx.how, ctx.dtype = how, x.dtype
        return _product(x, whole_weight(codes, scales, w_format, blocksize, x.dtype), backend, bias)

    @staticmethod
    @keeps_hooks
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx and dbias, and None for each that is not needed."""
        grads = gradients_of("lora_linear_apart", ctx, dy, _gradients)
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


def _gradients(ctx: Any, dy: Tensor, codes: Tensor, *scales: Tensor) -> tuple[Tensor | None, ...]:
    """Return (dx, None, dbias), and None for each that is not needed."""
    need_dx, _, need_dbias, *_ = ctx.needs_input_grad
    w_format, blocksize, backend = ctx.how
    dy = as_dense(dy, ctx.dtype)
    dx = None
    if need_dx:
        dx = _product(dy, whole_weight(codes, scales, w_format, blocksize, ctx.dtype), backend, transposed=True)
    return dx, None, column_sum(dy) if need_dbias else None
