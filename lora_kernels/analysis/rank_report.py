"""What the tools that change ranks tell: the rank and the error of each layer, as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lora_kernels.analysis.tables import as_table, as_text

if TYPE_CHECKING:
    from rich.table import Table

_MOST_LINES = 40
"""The number of layers that are listed one by one. More of them are summed up by the last part of their names."""


@dataclass(frozen=True)
class RankedLayer:
    """The update of one layer, and what it has become."""

    name: str
    size: str
    """The size of the update, such as "768 → 3072"."""
    before: int
    """The rank that it had, or the most that it could have."""
    r: int
    """The rank that it has now."""
    norm: float
    """‖ΔW‖_F of the update before."""
    distance: float
    """‖ΔW - ΔW_r‖_F between the update before and the one that was written, with the rounding to its dtype."""

    @property
    def error(self) -> float:
        """‖ΔW - ΔW_r‖ / ‖ΔW‖, and 0 for an update of zeros."""
        return self.distance / self.norm if self.norm > 0 else 0.0


@dataclass(frozen=True)
class RankReport:
    """The layers of an adapter that a tool has written. ``print`` shows a table, and rich a coloured one."""

    layers: list[RankedLayer]
    notes: tuple[str, ...] = ()
    """Remarks for the reader, beside the ranks."""
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    """The fields of the adapter's config."""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    """The tensors of the adapter: by layer, and by the part of their key in PEFT's file."""

    @property
    def error(self) -> float:
        """‖ΔW - ΔW_r‖ / ‖ΔW‖ over all layers together."""
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.distance for layer in self.layers)) / norm if norm > 0 else 0.0

    @property
    def parameters(self) -> int:
        """The number of elements of A and B."""
        return sum(tensor.numel() for parts in self.tensors.values() for tensor in parts.values())

    def to_json(self) -> dict[str, Any]:
        """Return the layers, the total error and the notes as JSON has them."""
        layers = [asdict(layer) | {"error": layer.error} for layer in self.layers]
        return {"layers": layers, "error": self.error, "parameters": self.parameters, "notes": list(self.notes)}

    def table(self) -> Table:
        """Return a table of rich. Raises ImportError where rich is not installed."""
        return as_table(self._rows(), notes=[self._total(), *self.notes])

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return "\n".join([as_text(self._rows()), self._total(), *self.notes])

    def _total(self) -> str:
        count = f"{len(self.layers)} layer" + "s" * (len(self.layers) != 1)
        return f"{count}, {self.parameters:,} parameters, error over all {self.error:.3g}"

    def _rows(self) -> list[list[str]]:
        if len(self.layers) <= _MOST_LINES:
            head = ["layer", "size", "rank before", "rank", "‖ΔW‖", "error"]
            return [head, *([*_words(layer), f"{layer.norm:.3g}", f"{layer.error:.3g}"] for layer in self.layers)]
        groups: dict[tuple[str, str], list[RankedLayer]] = {}
        for layer in self.layers:
            groups.setdefault((layer.name.rpartition(".")[2], layer.size), []).append(layer)
        rows = []
        for (name, size), group in groups.items():
            ranks = [_span([str(each) for each in sorted(getattr(g, key) for g in group)]) for key in ("before", "r")]
            numbers = [
                _span([f"{value:{how}}" for value in sorted(getattr(layer, key) for layer in group)])
                for key, how in (("norm", ".3g"), ("error", ".3g"))
            ]
            rows.append([f"{name} ({len(group)})", size, *ranks, *numbers])
        return [["layers", "size", "rank before", "rank", "‖ΔW‖", "error"], *rows]


def _words(layer: RankedLayer) -> list[str]:
    return [layer.name, layer.size, str(layer.before), str(layer.r)]


def _span(words: Sequence[str]) -> str:
    return words[0] if words[0] == words[-1] else f"{words[0]} to {words[-1]}"
