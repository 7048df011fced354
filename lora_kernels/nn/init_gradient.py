"""LoRA-GA: the first values of an adapter from the gradient of the full weight
(Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024, arXiv:2407.05000).

With G = dL/dW [N, K] and its singular vectors U and V, the adapter starts as

    A = c · V[:, :r]ᵀ,   B = c · U[:, r:2r],   c = N^¼ / √γ,   W_res = W - s·B A,

so that W_res + s·B A is W, and the first step of A and B changes it as nearly as rank 2r can in the direction in which
full fine-tuning would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.nn.init import checked
from lora_kernels.nn.low_rank import Part, finite, minus, svd

_ITERATIONS = 4
"""The subspace iterations of the authors' randomised SVD."""


@torch.no_grad()
def lora_ga(
    w: Tensor, gradient: Tensor, r: int, scale: float, *, gamma: float = 16.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (W_res, A, B) of LoRA-GA for W [N, K] and its gradient G [N, K], with W_res = W - s·B A.

    Args:
        w, r, scale, dtype: as in `lora_kernels.nn.init.pissa`; r is at most min(N, K) / 2.
        gradient: G = dL/dW, as a rule its mean over some batches. Its size does not matter.
        gamma: γ. s·B A has the norm s·√(N r) / γ, so a larger γ takes less out of W.

    Raises:
        TypeError: the dtype of W, or `dtype`, is none of fp32, bf16 and fp16.
        ValueError: as `pissa`; a gradient of another shape, not finite, or of a rank below 2r; an r above
            min(N, K) / 2; a γ that is not positive and finite.
    """
    exact = checked(w, Part(r, scale, None, dtype))
    if gradient.shape != w.shape:
        raise ValueError(
            f"the gradient must have the shape of the weight {tuple(w.shape)}, got {tuple(gradient.shape)}"
        )
    a, b = gradient_factors(gradient.to(w.device), r, gamma, dtype)
    return finite("W - s·B A", minus(exact, a, b, scale, w.dtype)), a, b


@torch.no_grad()
def gradient_factors(
    gradient: Tensor, r: int, gamma: float = 16.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return LoRA-GA's A [r, K] and B [N, r] for a gradient [N, K], as `lora_ga` does. W and s do not enter into them.

    The SVD is randomised with 4r columns and 4 subspace iterations, as the authors' is. Its random numbers have a fixed
    seed, and the largest element of each right singular vector is made positive.
    """
    N, K = check_rank(gradient.shape, r)
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    largest = gradient.abs().max().item()
    if not 0 < largest < math.inf:
        why = "zero" if largest == 0 else "not finite"
        raise ValueError(f"the gradient {(N, K)} is {why}, so it gives no adapter")
    normal = (gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / largest).float()
    u, s, vt = svd(normal, min(4 * r, N, K), _ITERATIONS)
    rank = int((s > 4 * torch.finfo(torch.float32).eps * math.sqrt(max(N, K)) * s[0]).sum())
    if rank < 2 * r:
        raise ValueError(
            f"the gradient {(N, K)} has rank {rank}, and LoRA-GA takes 2r = {2 * r} of its singular vectors: the rows "
            "of data are few, or the layers behind this one are narrow"
        )
    size = N**0.25 / math.sqrt(gamma)
    return finite("A", (size * vt[:r]).to(dtype)), finite("B", (size * u[:, r : 2 * r]).to(dtype))


def check_rank(shape: Sequence[int], r: int) -> tuple[int, int]:
    """Return N and K of a weight of this shape. Raises ValueError where it does not have 2r singular vectors."""
    N, K = shape
    if not 1 <= r <= min(N, K) // 2:
        raise ValueError(
            f"LoRA-GA takes 2r singular vectors of a gradient, so r must lie between 1 and min(N, K) / 2 = "
            f"{min(N, K) // 2} for a weight {(N, K)}, got {r}"
        )
    return N, K
