"""The singular value decomposition of an update ΔW = s·B A from its factors. ΔW itself is never made."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class DeltaSVD(NamedTuple):
    """ΔW = U diag(σ) Vᵀ in fp64, with k = min(r, N, K) singular values."""

    u: Tensor
    """The left singular vectors [N, k], orthonormal columns. Those of singular values of zero are arbitrary."""
    s: Tensor
    """The singular values σ [k], from the largest to the smallest. Those within the rounding error are exact zeros."""
    v: Tensor
    """The right singular vectors [K, k], orthonormal columns. Those of singular values of zero are arbitrary."""

    @property
    def rank(self) -> int:
        """The rank of ΔW: the number of singular values above zero."""
        return int(self.s.count_nonzero())


@torch.no_grad()
def delta_svd(a: Tensor, b: Tensor, scale: float = 1.0) -> DeltaSVD:
    """Return the singular value decomposition of ΔW = scale · B A, for A [r, K] and B [N, r] of any floating dtype.

        B = Q₁ R₁    Aᵀ = Q₂ R₂    R₁ R₂ᵀ = U' diag(σ') V'ᵀ    U = Q₁ U'    V = Q₂ V'    σ = scale · σ'

    It takes O((N + K) r²) operations and O((N + K) r) memory, in fp64. Before, row i of A and column i of B are scaled
    so that their largest elements are equal, which leaves B A as it is: no row is lost beside others that are long only
    because their columns are short. A negative scale goes to U, so that σ ≥ 0. What is not above ‖A‖_F ‖B‖_F ·
    max(N, K) · 2⁻⁵² of these in σ' is the rounding error of the two factorisations and becomes zero, so that an update
    which cancels, as that of an adapter merged with its own negative, has no singular values made of noise. The result
    lies on the device of A, or on the CPU where the device has no fp64.

    Raises ValueError for shapes that do not fit, and for A, B or a scale with NaN or infinite values.
    """
    check_factors(a, b)
    a, b, scale = wide(a), wide(b), float(scale)
    of_a, of_b = a.abs().amax(1), b.abs().amax(0)
    both = (of_a != 0) & (of_b != 0)  # also of NaN
    left = b * torch.where(both, of_a / of_b, 0.0).sqrt()
    right = a.T * torch.where(both, of_b / of_a, 0.0).sqrt()
    size = torch.linalg.matrix_norm(right) * torch.linalg.matrix_norm(left)
    if not math.isfinite(size * scale):
        raise ValueError(
            f"A {tuple(a.shape)}, B {tuple(b.shape)} or the scale {scale} has values that are NaN or infinite, so the "
            "update has no singular values: the training has diverged, or the file is damaged"
        )
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right)
    u, s, vt = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    s = torch.where(s > size * max(len(b), a.shape[1]) * torch.finfo(s.dtype).eps, s, 0.0)
    u = q1 @ u
    return DeltaSVD(-u if scale < 0 else u, s * abs(scale), q2 @ vt.T)


def check_factors(a: Tensor, b: Tensor) -> None:
    """Raise ValueError where A and B are not [r, K] and [N, r]."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ValueError(f"A {tuple(a.shape)} and B {tuple(b.shape)} are not [r, K] and [N, r]")


def wide(t: Tensor) -> Tensor:
    """Return the values of t in fp64, on its own device where that has fp64, and else on the CPU."""
    t = t.detach()
    return (t.cpu() if t.device.type == "mps" else t).to(torch.float64)
