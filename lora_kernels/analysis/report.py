"""`Report`: what `analyse` has found, as data, a table, JSON and pictures."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_kernels.analysis import report_table
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
    random: float
    """What `at_rank` is for unrelated updates, max(rank₁, rank₂) / K."""
    cosine: float
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖), which is near 0 for unrelated updates, and negative where they work against each
    other."""

    @property
    def first(self) -> float:
        """φ(1, 1): the squared cosine of the two strongest directions."""
        return self.phi[0][0]


@dataclass(frozen=True)
class LayerReport:
    """What one update is like."""

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
    """φ(rank, rank) of the right singular vectors of W and ΔW. That of random ones is rank / K."""
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
class Report:
    """What `analyse` returns. ``print(report)`` shows it as a table, which needs rich."""

    adapter: str
    """The adapter."""
    layers: tuple[LayerReport, ...]
    """The updates, in the order of the model or of the file."""
    base: str | None = None
    """Where W was read from; None where it was not looked at."""
    other: str | None = None
    """The adapter that it was compared with."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers should know."""
    without_weight: tuple[tuple[str, str], ...] = ()
    """The layers whose W could not be looked at, with the reason."""
    only_here: tuple[str, ...] = ()
    """The layers that the other adapter does not have."""
    only_there: tuple[str, ...] = ()
    """The layers that only the other adapter has."""

    def __iter__(self) -> Iterator[LayerReport]:
        """Yield the layers."""
        return iter(self.layers)

    def __str__(self) -> str:
        """Return the table as text."""
        return report_table.as_text(self)

    def table(self, every: bool | None = None) -> str:
        """Return the report as text: a line for each module, and for each layer if `every`. None shows the layers where
        they are at most 40. Raises ImportError where rich is not installed."""
        return report_table.as_text(self, every)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Yield what rich prints."""
        yield from report_table.renderables(self)

    def to_json(self) -> str:
        """Return the report as JSON. Its numbers are in full precision, and null stands for NaN and infinity."""
        document = asdict(self)
        for layer, entry in zip(self.layers, document["layers"], strict=True):
            entry |= {"module": layer.module, "block": layer.block, "relative_norm": layer.relative_norm}
            if layer.amplification is not None:
                entry["amplification"]["factor"] = layer.amplification.factor
            if layer.intruders is not None:
                entry["intruders"]["count"] = layer.intruders.count
        return json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False)

    def plot(self, directory: str | os.PathLike[str], suffix: str = ".png") -> list[Path]:
        """Write pictures into `directory`, which is made, and return their paths: the singular values; maps of block ×
        module of the effective rank and, where they are known, of ‖ΔW‖ / ‖W‖, the amplification factor and φ; and
        φ(i, j) of each module as a heat map, the mean over the blocks, beside what unrelated updates have. `suffix` is
        .png, .svg or .pdf. Raises ImportError where matplotlib is not installed."""
        from lora_kernels.analysis import report_plots

        return report_plots.draw(self, Path(directory), suffix)


def _finite(value: Any) -> Any:
    """Return the value with None for every number that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value
