"""The picture of a run: forward + backward over the frozen layer, by shape and variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kernels.bench.shapes import BACKWARD

_BASELINES = {"PEFT": "#8c8c8c", "addmm_": "#d9a441", "merge": "#c05b4d"}
_OURS = "#2a6f97"


def draw(document: dict[str, Any], path: Path) -> None:
    """A PNG with one panel per p. Raises ImportError where matplotlib is not installed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timings = [
        e for e in document["timings"] if e["pass"] == BACKWARD and (e["variant"] in _BASELINES or e["automatic"])
    ]
    shapes = list(dict.fromkeys(e["shape"] for e in timings))
    panels = list(dict.fromkeys(e["p"] for e in timings))
    figure = Figure(figsize=(max(7.0, 2.0 + 1.3 * len(shapes)), 3.2 * len(panels) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    for i, p in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, i + 1)
        _panel(axes, [e for e in timings if e["p"] == p], shapes, document["shapes"])
        axes.set_title(f"dropout {p:g}" if p else "no dropout", loc="left", fontsize=10)
        if i == 0:
            axes.legend(loc="upper right", ncols=4, fontsize=8, frameon=False)
    figure.suptitle("LoRA forward + backward over the frozen layer's (1 = F.linear with dx)", fontsize=11)
    device = document["device"]
    threads = f", {device['threads']} threads" if device["type"] == "cpu" else ""
    figure.supxlabel(
        f"{device['name']}{threads} · torch {document['versions']['torch']} · {document['date'][:10]} · "
        f"median of {document['rounds']} interleaved rounds, whiskers: quartiles",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, timings: list[dict[str, Any]], shapes: list[str], described: dict[str, Any]) -> None:
    order = [*_BASELINES, "ours"]
    width = 0.8 / len(order)
    top = 1.0
    for j, name in enumerate(order):
        entries = {e["shape"]: e for e in timings if (e["automatic"] if name == "ours" else e["variant"] == name)}
        places = [k for k, shape in enumerate(shapes) if shape in entries]
        if not places:
            continue
        ratios = [entries[shapes[k]]["ratio"] for k in places]
        middle = [ratio[1] for ratio in ratios]
        errors = [[ratio[1] - ratio[0] for ratio in ratios], [ratio[2] - ratio[1] for ratio in ratios]]
        xs = [k + (j - (len(order) - 1) / 2) * width for k in places]
        colour = _OURS if name == "ours" else _BASELINES[name]
        bars = axes.bar(
            xs, middle, width * 0.92, color=colour, label=name, yerr=errors, error_kw={"lw": 0.8, "ecolor": "#333333"}
        )
        axes.bar_label(bars, [f"{value:.2f}" for value in middle], fontsize=7, padding=2)
        top = max(top, *(ratio[2] for ratio in ratios))
    axes.axhline(1.0, color="#333333", lw=0.8)
    axes.set_ylim(0, top * 1.25)
    axes.set_xticks(
        range(len(shapes)), [f"{shape}\n{described[shape]['size']}".replace(", ", "\n") for shape in shapes], fontsize=7
    )
    axes.spines[["top", "right"]].set_visible(False)
