"""First values of an adapter that leave W and the layer's output as they are: s·B A is zero.

    kaiming      A Kaiming-uniform(√5), B zero
                 (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685)
    gaussian     A normal(0, 1/r²), B zero: PEFT's init_lora_weights="gaussian"
    orthogonal   A = Q₁ᵀ X₁ / 10 and B = X₂ Q₂ / 10, for the rows Q₁ and Q₂ of an orthogonal Q [r, r]: neither is zero,
                 and B A = X₂ Q₂ Q₁ᵀ X₁ / 100 is. PEFT's init_lora_weights="orthogonal"

They write into A [r, K] and B [N, r] in place, and draw from torch's default generators.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def kaiming(a: Tensor, b: Tensor) -> None:
    """Make A Kaiming-uniform(√5), as the weight of an ``nn.Linear`` starts, and B zero."""
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(b)


def gaussian(a: Tensor, b: Tensor) -> None:
    """Make A normal with the standard deviation 1/r, and B zero."""
    nn.init.normal_(a, std=1 / a.shape[0])
    nn.init.zeros_(b)


@torch.no_grad()
def orthogonal(a: Tensor, b: Tensor) -> None:
    """Make A and B normal matrices of half the rank each, in two orthogonal subspaces of the r dimensions between them.

    Q is the orthogonal factor of a normal matrix [r, r], Q₁ its rows 0, 2, ... and Q₂ its rows 1, 3, ...; X₁ and X₂ are
    normal. So A has rank ⌈r/2⌉ and B ⌊r/2⌋ at first. With r = 1 B is zero. B A is zero up to the rounding of A and B to
    their dtype. The numbers come from the CPU's generator, in PEFT's order.
    """
    r, K = a.shape
    first, second = (r + 1) // 2, r // 2
    q = torch.linalg.qr(_normal(r, r)).Q
    a.copy_((_normal(K, first) @ q[0::2]).T / 10)
    b.copy_(_normal(second, b.shape[0]).T @ q[1::2] / 10)


def _normal(*shape: int) -> Tensor:
    """Return normal numbers that were drawn in fp32, in fp64, in which autocast leaves a product alone."""
    return torch.randn(shape, dtype=torch.float32, device="cpu").double()


FIRST_VALUES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
}
"""The functions of this file, by the names that `init` has."""
