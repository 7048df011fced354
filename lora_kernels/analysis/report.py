"""`Report`: what `analyse` has found, as data, a table, JSON and pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_kernels.analysis import report_table
from lora_kernels.analysis.findings import Findings, LayerReport


@dataclass(frozen=True)
class Report(Findings):
    """What `analyse` returns. ``print(report)`` shows it as a table, which needs rich."""

    def __iter__(self) -> Iterator[LayerReport]:
        """Yield the layers."""
        return iter(self.layers)

    def __str__(self) -> str:
        """Return the table as text."""
        return report_table.as_text(self)

    def table(self, every: bool | None = None) -> str:
        """Return the report as text: a line for each module, and for each layer if `every`. None shows the layers where
        they are at most 16. Raises ImportError where rich is not installed."""
        return report_table.as_text(self, every)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Yield what rich prints."""
        yield from report_table.renderables(self, None, options.max_width)

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
