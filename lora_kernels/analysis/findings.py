"""`Findings`: what `analyse` has found, as data."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lora_kernels.analysis.directions import Amplification, Intruders

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Comparison:
    """How the update of a layer resembles that of the other adapter."""

    phi: tuple[tuple[float, ...], ...]
    """φ(i, j) [r₁, r₂] of the right singular vectors. It is NaN beyond the ranks of the updates."""
    at_rank: float
    """φ at the ranks of the two updates: how much of the smaller one's input directions the other has."""
    mean: float
    """The mean φ over i and j."""
    mean_random: float
    """The expected value of `mean` for unrelated updates."""
    random: float
    """The expected value of `at_rank` for unrelated updates, max(rank₁, rank₂) / K."""
    cosine: float
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖), which is near 0 for unrelated updates, and negative where they work against each
    other."""

    @property
    def first(self) -> float:
        """φ(1, 1): the squared cosine of the two strongest directions."""
        return self.phi[0][0]


@dataclass(frozen=True)
class LayerReport:
    """The measures of one update."""

    name: str
    """The plain name of the layer, with its part and expert where it has several updates."""
    kind: str
    """"linear", "embedding", "conv", "experts" or "attention"."""
    shape: tuple[int, int]
    """(N, K) of ΔW. K of a convolution is channels times kernel, that of an embedding its number of tokens."""
    r: int
    """The number of rows of A."""
    rank: int
    """The rank of ΔW."""
    scale: float
    """s."""
    dora: bool
    """Whether the layer has DoRA. Then ΔW is the update of the direction, and the rows of W + ΔW are scaled."""
    singular_values: tuple[float, ...]
    """σ of ΔW, from the largest to the smallest."""
    norm: float
    """‖ΔW‖_F."""
    effective_rank: float
    """exp of the entropy of σ / Σσ."""
    stable_rank: float
    """‖ΔW‖_F² / σ₁²."""
    energy_rank_90: int
    """The least k whose σ have 90 % of ‖ΔW‖²."""
    energy_rank_99: int
    """The same for 99 %: the rank that would do, with a relative error of a tenth of ‖ΔW‖. Where it is r itself, more
    might be used."""
    weight_norm: float | None = None
    """‖W‖_F; None, as all that follows, where W was not looked at."""
    amplification: Amplification | None = None
    """How much ΔW amplifies W in its own directions."""
    phi_weight: float | None = None
    """φ(rank, rank) of the right singular vectors of W and ΔW. That of random ones is rank / K.
    NaN for a W of a lower rank than ΔW."""
    intruders: Intruders | None = None
    """The directions of W + ΔW that W does not have; None where they were not asked for."""
    comparison: Comparison | None = None
    """The same layer of the other adapter."""

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖ / ‖W‖; None where W was not looked at."""
        if self.weight_norm is None:
            return None
        return self.norm / self.weight_norm if self.weight_norm > 0 else math.inf

    @property
    def module(self) -> str:
        """The module of its block, such as "self_attn.q_proj": what follows the first number in the name; or the whole
        name. Experts count as one module."""
        name = re.sub(r"\[\d+\]$", "", self.name)
        found = _NUMBER.search(name)
        return name[found.end() :] or name if found else name

    @property
    def block(self) -> str:
        """The block that it belongs to, such as "model.layers.3": the name as far as the first number; or ""."""
        found = _NUMBER.search(self.name)
        return self.name[: found.end(1)] if found else ""


@dataclass(frozen=True)
class Findings:
    """The measures of all updates of an adapter."""

    adapter: str
    """The adapter."""
    layers: tuple[LayerReport, ...]
    """The updates, in the order of the model or of the file."""
    base: str | None = None
    """Where W was read from; None where it was not looked at."""
    other: str | None = None
    """The adapter that it was compared with."""
    notes: tuple[str, ...] = ()
    """Remarks for the reader, such as that a restart has changed W."""
    without_weight: tuple[tuple[str, str], ...] = ()
    """The layers whose W could not be looked at, with the reason."""
    only_here: tuple[str, ...] = ()
    """The layers that the other adapter does not have."""
    only_there: tuple[str, ...] = ()
    """The layers that only the other adapter has."""
