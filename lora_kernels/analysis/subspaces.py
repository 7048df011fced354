"""How much of the subspace of one update lies in that of another.

    φ(i, j) = ‖U₁ⁱᵀ U₂ʲ‖_F² / min(i, j)        in [0, 1]

U₁ⁱ are the first i singular vectors of one matrix and U₂ʲ the first j of another. It is 1 where the smaller subspace
lies in the larger one, and 0 where they are orthogonal (Hu et al., "LoRA: Low-Rank Adaptation of Large Language
Models", 2021, arXiv:2106.09685, section 7.2 and appendix G; the appendix prints φ = (1 − d²)/min(i, j) for the
projection metric d, where its definitions give 1 − d²/min(i, j)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.analysis.delta import check_factors, delta_svd, wide

OF = ("delta", "A", "B")


def subspace_similarity(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], of: str = "delta") -> Tensor:
    """Return φ(i, j) for i = 1 … r₁ and j = 1 … r₂ as [r₁, r₂], in fp64 on the CPU.

    φ of unrelated subspaces is not zero: compare it with `random_similarity`.

    Args:
        first, second: (A, B) of two updates of one weight, A [r, K] and B [N, r], of any rank and floating dtype.
        of: the singular vectors that are compared. "delta": the right ones of ΔW = B A, [K, r]. They do not change if
            A becomes T A and B becomes B T⁻¹. "A": the right ones of A, as in the LoRA paper. "B": the left ones of B,
            [N, r]. Those of A and of B depend on T, hence on how the update happens to be split between the two.
            The left ones of ΔW are "delta" of (Bᵀ, Aᵀ).

    A row i or a column j beyond the rank of its matrix is NaN: there are no such directions, and what a decomposition
    returns for them is arbitrary. An update that has not been trained, whose B is zero, has rank 0.

    Raises ValueError for matrices that are not [r, K] and [N, r], whose K (or N, for "B") differ, that hold NaN or
    infinite values, or for another `of`.
    """
    if of not in OF:
        raise ValueError(f"of={of!r} must be one of {', '.join(map(repr, OF))}")
    return similarity_of(_vectors(*first, of), _vectors(*second, of))


def similarity_of(first: tuple[Tensor, int], second: tuple[Tensor, int]) -> Tensor:
    """Return φ(i, j) as [k₁, k₂], for two matrices of orthonormal columns [d, k] on the CPU and the number of columns
    that count in each; the others give NaN. Raises ValueError where d differs."""
    (u, m), (v, n) = first, second
    if len(u) != len(v):
        raise ValueError(
            f"the singular vectors have {len(u)} and {len(v)} elements: two updates can be compared only over weights "
            "of one size"
        )
    i, j = (torch.arange(1, each.shape[1] + 1, dtype=u.dtype) for each in (u, v))
    phi = (u.T @ v).square().cumsum(0).cumsum(1) / torch.minimum(i[:, None], j)
    phi = phi.clamp(max=1.0)  # rounding may lift it by 1e-16
    phi[m:] = torch.nan
    phi[:, n:] = torch.nan
    return phi


def random_similarity(r1: int, r2: int, d: int) -> Tensor:
    """Return the expected φ(i, j) of two random subspaces of d dimensions, [r₁, r₂]: max(i, j) / d. This is what
    unrelated updates have."""
    if not 1 <= max(r1, r2) <= d:
        raise ValueError(f"subspaces of {r1} and {r2} dimensions in {d} dimensions: both must be from 1 to {d}")
    i, j = (torch.arange(1, r + 1, dtype=torch.float64) for r in (r1, r2))
    return torch.maximum(i[:, None], j) / d


def _vectors(a: Tensor, b: Tensor, of: str) -> tuple[Tensor, int]:
    """Return the singular vectors to compare on the CPU, and how many there are."""
    check_factors(a, b)
    if of == "delta":
        svd = delta_svd(a, b)
        return svd.v.cpu(), svd.rank
    own = wide(a).T if of == "A" else wide(b)
    svd = delta_svd(torch.eye(own.shape[1], dtype=own.dtype, device=own.device), own)
    return svd.u.cpu(), svd.rank
