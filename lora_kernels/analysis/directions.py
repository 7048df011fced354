"""What an update does to the directions of its weight: how much it amplifies them, and whether it adds new ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.analysis.delta import DeltaSVD, check_factors, delta_svd, wide
from lora_kernels.analysis.frozen import FrozenWeight, Leading
from lora_kernels.analysis.subspaces import similarity_of
from lora_kernels.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Amplification:
    """How much ΔW amplifies the part of W in its own directions.

    U [N, k] and V [K, k] are the singular vectors of ΔW. UᵀWV is what W already does between these directions.
    """

    rank: int
    """k, the rank of ΔW."""
    delta_norm: float
    """‖ΔW‖_F."""
    weight_norm: float
    """‖W‖_F."""
    projected: float
    """‖UᵀWV‖_F."""
    projected_top: float | None
    """The same for W's own leading k singular vectors, which is √(Σ_{i≤k} σᵢ²) of W, the most that it can be. None
    where it was not asked for."""
    projected_random: float
    """The same for random U and V, the root of its mean square: ‖W‖_F · k / √(N K)."""

    @property
    def factor(self) -> float:
        """The amplification factor ‖ΔW‖_F / ‖UᵀWV‖_F; NaN for a ΔW of zero, and infinite where UᵀWV is zero."""
        if self.rank == 0:
            return math.nan
        return self.delta_norm / self.projected if self.projected > 0 else math.inf


@torch.no_grad()
def amplification(
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    top: bool = True,
    seed: int = 0,
) -> Amplification:
    """Return the amplification factor ‖ΔW‖_F / ‖UᵀWV‖_F of ΔW = scale · B A, and what it is to be compared with.

    U and V are the singular vectors of ΔW. A factor far above 1 says that the update strengthens directions which W has
    but hardly uses (Hu et al., 2021, arXiv:2106.09685, section 7.3 and table 7; the paper writes UᵀWVᵀ for a V whose
    rows are the vectors).

    Args:
        weight: W [N, K], dense in any floating dtype, or quantised. A quantised one is dequantised 512 rows at a time.
        lora_a, lora_b: A [r, K] and B [N, r] in any floating dtype.
        scale: s.
        top: whether to find W's own leading singular values for the reference `projected_top`. They are exact where
            min(N, K) is at most 512 and otherwise within 6 % below; it takes seven more products with W.
        seed: the seed of the random vectors with which that begins.

    Raises ValueError for shapes that do not fit, for a weight without values, and for NaN or infinite values.
    """
    check_factors(lora_a, lora_b)
    frozen = fitting(weight, lora_a, lora_b)
    svd = delta_svd(lora_a, lora_b, scale)
    return amplification_of(frozen, svd, frozen.leading(max(1, svd.rank), seed) if top else None)


def amplification_of(weight: FrozenWeight, svd: DeltaSVD, leading: Leading | None) -> Amplification:
    """Return what `amplification` returns. `leading` holds at least as many singular values of W as ΔW has, or is None
    where `projected_top` is not wanted."""
    k, norm, (N, K) = svd.rank, weight.norm, weight.shape
    u, v = svd.u[:, :k], svd.v[:, :k]
    core = u.to(weight.device, weight.dtype).T @ weight.times(v)
    top = None if leading is None else float(torch.linalg.vector_norm(leading.s[:k]))
    return Amplification(
        rank=k,
        delta_norm=float(torch.linalg.vector_norm(svd.s)),
        weight_norm=norm,
        projected=float(torch.linalg.matrix_norm(core.double())),
        projected_top=top,
        projected_random=norm * k / math.sqrt(N * K),
    )


@torch.no_grad()
def weight_similarity(
    weight: Tensor | QuantizedWeight, lora_a: Tensor, lora_b: Tensor, k: int | None = None, seed: int = 0
) -> Tensor:
    """Return φ(i, j) of the right singular vectors of W and ΔW, for i = 1 … k and j = 1 … r, as [k, r] (Hu et al.,
    2021, arXiv:2106.09685, appendix H.3 and figure 8).

    `k` is the number of W's leading vectors, by default r; they are as exact as `amplification` says of the singular
    values. Rows and columns beyond the ranks of W and ΔW are NaN. Raises what `amplification` raises.
    """
    check_factors(lora_a, lora_b)
    frozen = fitting(weight, lora_a, lora_b)
    svd = delta_svd(lora_a, lora_b)
    k = min(len(lora_a), *frozen.shape) if k is None else k
    leading = frozen.leading(k, seed)
    return similarity_of((leading.v.cpu(), leading.rank), (svd.v.cpu(), svd.rank))


@dataclass(frozen=True)
class Intruders:
    """The directions of W + ΔW that W does not have."""

    cosines: tuple[float, ...]
    """For each of the leading left singular vectors of W + ΔW, the largest |cos| with any left singular vector of W."""
    threshold: float
    """Below it, a vector is an intruder dimension."""

    @property
    def count(self) -> int:
        """The number of intruder dimensions."""
        return sum(cosine < self.threshold for cosine in self.cosines)


@torch.no_grad()
def intruder_dimensions(
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    k: int = 10,
    threshold: float = 0.5,
) -> Intruders:
    """Return the intruder dimensions among the leading `k` left singular vectors of W + ΔW: those whose largest |cos|
    with any left singular vector of W is below `threshold` (Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion
    of Equivalence", 2024, arXiv:2410.21228).

    It solves two eigenvalue problems of min(N, K) in fp64, those of W Wᵀ and (W + ΔW)(W + ΔW)ᵀ or of the other side,
    where the definition takes two full singular value decompositions. Vectors of W whose singular value is below 10⁻⁷
    of the largest are not counted as W's. Arguments and errors are those of `amplification`, and ValueError for a `k`
    below 1.
    """
    check_factors(lora_a, lora_b)
    if k < 1:
        raise ValueError(f"k={k} leading singular vectors: it must be at least 1")
    return intruders_of(fitting(weight, lora_a, lora_b), lora_a, lora_b, scale, k, threshold)


def intruders_of(
    frozen: FrozenWeight, lora_a: Tensor, lora_b: Tensor, scale: float, k: int = 10, threshold: float = 0.5
) -> Intruders:
    """Return what `intruder_dimensions` returns. Raises ValueError for A, B or a scale with NaN or infinite values."""
    a, b = (wide(each).to(frozen.device) for each in (lora_a, lora_b))
    a = a * float(scale)
    gram, is_right = frozen.gram()
    # (W + BA)ᵀ(W + BA) = WᵀW + (WᵀB) A + Aᵀ (WᵀB)ᵀ + Aᵀ (BᵀB) A, and the same for the other side
    inner, outer = (b, a.T) if is_right else (a.T, b)
    mixed = (frozen.transposed_times(inner) if is_right else frozen.times(inner)).double()
    cross = mixed @ outer.T
    tuned = gram + cross + cross.T + outer @ (inner.T @ inner) @ outer.T
    if not torch.isfinite(tuned).all():
        raise ValueError(
            f"A {tuple(a.shape)}, B {tuple(b.shape)} or the scale {scale} has values that are NaN or infinite"
        )
    squares, vectors = (each.flip(-1) for each in torch.linalg.eigh(gram))
    s = squares.clamp(min=0).sqrt()
    top = torch.linalg.eigh(tuned)[1].flip(1)[:, :k]
    known = s > s[0] * 1e-7
    if is_right:  # left vectors are W v / σ and (W + ΔW) v' / σ'
        y = frozen.times(top).double() + b @ (a @ top)
        y /= torch.linalg.vector_norm(y, dim=0).clamp(min=torch.finfo(y.dtype).tiny)
        cosines = (vectors.T @ frozen.transposed_times(y).double())[known] / s[known, None]
    else:
        cosines = (vectors.T @ top)[known]
    largest = cosines.abs().amax(0) if known.any() else top.new_zeros(top.shape[1])
    return Intruders(tuple(largest.clamp(max=1.0).tolist()), threshold)


def fitting(weight: Tensor | QuantizedWeight, lora_a: Tensor, lora_b: Tensor, transposed: bool = False) -> FrozenWeight:
    """Return W as an operator. Raises ValueError where it is not [N, K] for A [r, K] and B [N, r]."""
    frozen = FrozenWeight(weight, transposed)
    if frozen.shape != (lora_b.shape[0], lora_a.shape[1]):
        raise ValueError(
            f"W {frozen.shape} does not go with A {tuple(lora_a.shape)} and B {tuple(lora_b.shape)}, whose update is "
            f"({lora_b.shape[0]}, {lora_a.shape[1]})"
        )
    return frozen
