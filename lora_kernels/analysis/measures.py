"""Numbers that describe a spectrum σ₁ ≥ σ₂ ≥ … ≥ 0: how many directions an update really uses.

They are functions of the singular values alone. That of an update which is zero are 0.
"""

from __future__ import annotations

from torch import Tensor


def effective_rank(s: Tensor) -> float:
    """Return exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σσ: 1 for one direction, k for k directions of equal strength (Roy and
    Vetterli, "The effective rank", EUSIPCO 2007)."""
    s = s[s > 0].double()
    if s.numel() == 0:
        return 0.0
    p = s / s.sum()
    return float((-(p * p.log()).sum()).exp())


def stable_rank(s: Tensor) -> float:
    """Return ‖ΔW‖_F² / σ₁²: at least 1 and at most the rank, and hardly changed by small singular values."""
    if s.numel() == 0 or s[0] <= 0:
        return 0.0
    return float((s.double() / s[0].double()).square().sum())


def energy_rank(s: Tensor, energy: float) -> int:
    """Return the least k with Σ_{i≤k} σᵢ² ≥ energy · Σσ². The update cut to rank k has the relative error
    √(1 − energy) or less. Raises ValueError for an energy outside (0, 1]."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy={energy} must be above 0 and at most 1: the part of ‖ΔW‖² that is kept")
    s = s[s > 0].double()
    return least_rank((s / s[0]).square(), energy) if s.numel() else 0


def least_rank(squares: Tensor, energy: float) -> int:
    """Return the least k with Σ_{i≤k} squaresᵢ ≥ energy · Σ squares, from large to small."""
    # Sums of what is left out: a small square that is added to the sum of the large ones would be lost.
    left = squares.flip(0).cumsum(0).flip(0)
    return int((left > left[0] - energy * left[0]).sum())
