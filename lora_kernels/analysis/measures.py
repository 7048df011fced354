"""Numbers that describe a spectrum σ₁ ≥ σ₂ ≥ … ≥ 0: how many directions an update really uses.

They are functions of the singular values alone. Each of them is 0 for an update that is zero.
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
    return least_rank((s / s[:1]).square(), energy)


def least_rank(squares: Tensor, energy: float) -> int:
    """Return the least k with Σ_{i≤k} cᵢ ≥ energy · Σc for `squares` c₁ ≥ c₂ ≥ …, of fp64; 0 where there are none, or
    all are zero."""
    # The sum of what is left out is exact where nothing is left, which a sum of what is kept is not.
    left = squares.flip(0).cumsum(0).flip(0)
    return int((left > left[0] - energy * left[0]).sum()) if len(left) else 0
