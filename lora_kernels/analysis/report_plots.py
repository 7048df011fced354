"""The pictures of a report, one file for each question."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_kernels.analysis import plots
from lora_kernels.analysis.findings import Findings, LayerReport
from lora_kernels.analysis.subspaces import random_similarity


def draw(report: Findings, directory: Path, suffix: str) -> list[Path]:
    """Write the pictures of a report and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    layers = report.layers
    written = [directory / f"spectra{suffix}"]
    plots.plot_spectra(
        {layer.name: layer.singular_values for layer in layers},
        written[0],
        groups={layer.name: layer.module for layer in layers},
        effective={layer.name: layer.effective_rank for layer in layers},
        title="Singular values of ΔW",
    )
    maps: list[tuple[str, str, Callable[[LayerReport], Any], float | None]] = [
        ("effective_rank", "effective rank of ΔW", lambda layer: layer.effective_rank, None),
        ("relative_norm", "‖ΔW‖ / ‖W‖", lambda layer: layer.relative_norm, None),
        (
            "amplification",
            "amplification factor",
            lambda layer: layer.amplification and layer.amplification.factor,
            1.0,
        ),
        ("similarity", "φ of the two adapters", lambda layer: layer.comparison and layer.comparison.at_rank, None),
    ]
    for name, label, value, reference in maps:
        if any(value(layer) is not None for layer in layers):
            written.append(directory / f"{name}{suffix}")
            _map(layers, value, written[-1], label, reference)
    modules = dict.fromkeys(layer.module for layer in layers if layer.comparison is not None)
    for module in modules:
        written.append(directory / f"similarity_{re.sub(r'[^A-Za-z0-9]+', '_', module).strip('_')}{suffix}")
        _heat_maps([layer for layer in layers if layer.module == module and layer.comparison], written[-1], report)
    return written


def _map(
    layers: Sequence[LayerReport],
    value: Callable[[LayerReport], Any],
    path: Path,
    label: str,
    reference: float | None,
) -> None:
    """Draw one number of each layer by block and module; the mean, where several have one place, as experts have."""
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    modules = list(dict.fromkeys(layer.module for layer in layers))
    cells: dict[tuple[str, str], list[float]] = {}
    for layer in layers:
        if (number := value(layer)) is not None and not math.isnan(number):
            cells.setdefault((layer.block, layer.module), []).append(number)
    means = [[_mean(cells.get((block, module), [])) for module in modules] for block in blocks]
    names = [re.sub(r"^.*\.(?=\d+$)", "", block) if _all_numbered(blocks) else block or "–" for block in blocks]
    plots.plot_layers(means, path, blocks=names, modules=modules, label=label, reference=reference)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


def _all_numbered(blocks: Sequence[str]) -> bool:
    """Return whether all blocks are of one list, so that their numbers tell them apart."""
    return len({re.sub(r"\d+$", "", block) for block in blocks}) == 1


def _heat_maps(layers: Sequence[LayerReport], path: Path, report: Findings) -> None:
    """Draw φ(i, j) of a module: the mean over its layers, the first and the last of them, and unrelated subspaces.
    Where layers differ in size, those of the most frequent size are drawn."""
    phis: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
    for layer in layers:
        assert layer.comparison is not None
        phi = torch.tensor(layer.comparison.phi, dtype=torch.float64)
        phis.setdefault((*phi.shape, layer.shape[1]), {})[layer.name] = phi
    (r1, r2, K), same = max(phis.items(), key=lambda item: len(item[1]))
    panels = dict(same)
    if len(same) > 1:
        ends = {name: same[name] for name in (next(iter(same)), next(reversed(same)))}
        panels = {f"mean of {len(same)} layers": torch.stack(list(same.values())).nanmean(0)} | ends
    plots.plot_similarity(
        panels,
        path,
        random=random_similarity(r1, r2, K),
        rows=f"i, of {Path(report.adapter).name}",
        columns=f"j, of {Path(report.other or '').name}",
        title=f"φ(i, j), {layers[0].module}",
    )
