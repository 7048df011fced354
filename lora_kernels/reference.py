"""The equation in plain torch: the reference that every kernel is judged by. The judge (testing/judge.py) and the tests
use it; no public function of the package calls it.

h = x̂ Aᵀ        x̂ = dropout(x, p)
y = x Wᵀ + bias + s · h Bᵀ

DoRA, where d = m / ‖W + s·B A‖ by rows and the norm is a constant for autograd:

y = x Wᵀ + bias + (d - 1) ⊙ (x̂ Wᵀ) + d ⊙ (s · h Bᵀ)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.core import dropout


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return y [..., N] for x [..., K], weight [N, K], lora_a [R, K], lora_b [N, R] and bias [N], in any floating
    dtype. It is differentiable by autograd in all of them.

    Adapters of another dtype are converted to x's. `seed` (int64, one element) is needed where `dropout_p` > 0; the
    mask is that of core/dropout.py.
    """
    x_hat = _dropout(x, dropout_p, seed)
    h = x_hat @ lora_a.to(x.dtype).mT
    y = x @ weight.mT + scale * (h @ lora_b.to(x.dtype).mT)
    return y if bias is None else y + bias


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return DoRA's y [..., N]. The operands are those of `lora_linear`, and the magnitude m [N]."""
    x_hat = _dropout(x, dropout_p, seed)
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    d = magnitude.to(x.dtype) / torch.linalg.vector_norm((weight + scale * (b @ a)).detach(), dim=1)
    y = x @ weight.mT + (d - 1) * (x_hat @ weight.mT) + d * (scale * (x_hat @ a.mT @ b.mT))
    return y if bias is None else y + bias


def _dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return x̂ for x [..., K]; its rows are counted over all leading dimensions."""
    if p == 0:
        return x
    assert seed is not None, "dropout needs a seed"
    return dropout.dropout(x.reshape(-1, x.shape[-1]), p, seed).reshape(x.shape)
