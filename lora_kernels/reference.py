"""The equation, in plain torch: what every kernel answers to. Imported by tests and bench only.

h = x̂ Aᵀ        x̂ = dropout(x, p)
y = x Wᵀ + bias + s · h Bᵀ

DoRA: d = m / ‖W + s·B A‖ by rows, the norm a constant, and y = x Wᵀ + bias + (d - 1) ⊙ (x̂ Wᵀ) + d ⊙ (s · h Bᵀ)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.core import dropout as random


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
    """y [...,N] for x [...,K], weight [N,K], lora_a [R,K], lora_b [N,R], bias [N]; any floating dtype, differentiable
    by autograd in all of them.

    Adapters of another dtype are converted to x's. `seed` (int64, one element) is needed where `dropout_p` > 0; the
    mask is `random`'s.
    """
    x_hat = x
    if dropout_p > 0:
        assert seed is not None, "dropout needs a seed"
        x_hat = random.dropout(x.reshape(-1, x.shape[-1]), dropout_p, seed).reshape(x.shape)
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
    """As `lora_linear`, with magnitude [N]."""
    x_hat = x
    if dropout_p > 0:
        assert seed is not None, "dropout needs a seed"
        x_hat = random.dropout(x.reshape(-1, x.shape[-1]), dropout_p, seed).reshape(x.shape)
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    d = magnitude.to(x.dtype) / torch.linalg.vector_norm((weight + scale * (b @ a)).detach(), dim=1)
    y = x @ weight.mT + (d - 1) * (x_hat @ weight.mT) + d * (scale * (x_hat @ a.mT @ b.mT))
    return y if bias is None else y + bias
