"""The best update of a lower rank, and how far it is from the first one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.analysis.delta import DeltaSVD, delta_svd
from lora_kernels.analysis.measures import least_rank
from lora_kernels.analysis.stored import StoredUpdate


def check_rank(r: int | None, energy: float | None) -> None:
    """Raise ValueError unless r is at least 1 and energy lies in (0, 1], and one of them is given."""
    if r is None and energy is None:
        raise ValueError("say how much to keep: r=, the rank of each layer, or energy=, the part of ‖ΔW‖² such as 0.99")
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ValueError(f"r must be an integer of at least 1, got {r!r}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], got {energy!r}")


def kept_rank(spectra: Sequence[Tensor], r: int | None, energy: float | None) -> int:
    """Return the least k with Σ_{i≤k} σᵢ² ≥ energy · Σ σᵢ², summed over the spectra of a layer, but at most r and at
    least 1. Without energy it is r. It is never more than the longest spectrum has."""
    most = max(len(s) for s in spectra)
    k = most if r is None else min(r, most)
    if energy is not None:
        squares = torch.zeros(most, dtype=torch.float64)
        for s in spectra:
            squares[: len(s)] += s.cpu().double().square()
        k = min(k, least_rank(squares, energy))
    return max(k, 1)


def spectra_of(update: StoredUpdate, name: str) -> list[DeltaSVD]:
    """Return the decomposition of each product B A of an update, without its s. Raises ValueError, which names the
    layer, for values that are not finite."""
    try:
        return [delta_svd(a, b) for a, b in zip(update.a, update.b, strict=True)]
    except ValueError as error:
        raise ValueError(f"{name}: {error}; nothing was written") from None


def balanced(parts: Sequence[DeltaSVD], k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A [E, k, K] = √σ Vᵀ and B [E, N, k] = U √σ of the k largest singular values, rounded once to `dtype`. Rows
    beyond the singular values that there are hold zeros. Raises ValueError where `dtype` overflows."""
    factors = []
    for u, s, v in parts:
        root = s[:k].sqrt()
        a, b = v.new_zeros(k, len(v)), u.new_zeros(len(u), k)
        a[: len(root)], b[:, : len(root)] = root[:, None] * v[:, :k].T, u[:, :k] * root
        factors.append((a, b))
    a, b = (torch.stack(each).to(dtype) for each in zip(*factors, strict=True))
    if not (a.float().isfinite().all() and b.float().isfinite().all()):  # 8 bits have no isfinite
        raise ValueError(f"A or B overflows {dtype}")
    return a, b


def norm_of(a: Tensor, b: Tensor, scale: float = 1.0) -> float:
    """Return ‖s B A‖_F, over all matrices of stacks A [E, r, K] and B [E, N, r]."""
    return math.sqrt(math.fsum(delta_svd(*each, scale).s.square().sum().item() for each in zip(a, b, strict=True)))


def distance(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> float:
    """Return ‖B₁ A₁ - B₂ A₂‖_F of stacks A [E, r, K] and B [E, N, r], in fp64. Neither product is made."""
    a = torch.cat([a1.double(), a2.double()], dim=1)
    return norm_of(a, torch.cat([b1.double(), -b2.double()], dim=2))
