"""The picture of `benchmarks.generation_many`: tokens per second over the number of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kernels.bench.plot import write

_COLOURS = {"base": "#333333", "PEFT": "#8c8c8c", "PEFT, fused": "#2a6f97"}


def draw(document: dict[str, Any], path: Path) -> None:
    """Write a PNG with a group of bars for each number of adapters. Raises ImportError if matplotlib is not
    installed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    groups = list(dict.fromkeys((row["n"], row["batch"]) for row in document["rows"]))
    width = 0.8 / len(_COLOURS)
    for j, (name, colour) in enumerate(_COLOURS.items()):
        rows = {row["n"]: row["tokens_per_second"] for row in document["rows"] if row["name"] == name}
        values = [rows[n] for n, _ in groups]
        errors = [[v[1] - v[0] for v in values], [v[2] - v[1] for v in values]]
        xs = [k + (j - (len(_COLOURS) - 1) / 2) * width for k in range(len(groups))]
        more = {"yerr": errors, "error_kw": {"lw": 0.8, "ecolor": "#333333"}}
        bars = axes.bar(xs, [v[1] for v in values], width * 0.92, color=colour, label=name, **more)
        axes.bar_label(bars, [f"{v[1]:.0f}" for v in values], fontsize=7, padding=2)
    labels = [f"{n} adapter{'s' * (n > 1)}\n{batch} rows" for n, batch in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.set_ylabel("tokens/s", fontsize=9)
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.legend(fontsize=8, frameon=False, ncols=len(_COLOURS), loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    size, device = document["size"], document["device"]
    figure.suptitle(f"generate with an adapter for each row: Llama, {size['layers']} layers, hidden {size['hidden']}")
    figure.supxlabel(
        f"{device['name']}, {device['threads']} threads · torch {document['versions']['torch']} · "
        f"{document['date'][:10]} · median of {document['rounds']} interleaved rounds, whiskers: quartiles",
        fontsize=8,
    )
    write(figure, path)
