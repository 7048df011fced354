"""The picture of `python -m benchmarks.peers`: forward + backward of each project over the frozen layer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kernels.bench.plot import write

_OURS = ("#2a6f97", "#8ab6d6")
_OTHERS = ("#8c8c8c", "#d9a441", "#c05b4d", "#6a9f58", "#7b6ba8")


def draw(document: dict[str, Any], floor: str, ours: tuple[str, ...], path: Path) -> None:
    """Write a PNG with a panel of bars for each dropout. Raises ImportError if matplotlib is not installed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timings = [entry for entry in document["timings"] if entry["name"] != floor]
    names = list(dict.fromkeys(entry["name"] for entry in timings))
    others = [name for name in names if name not in ours]
    colours = dict(zip(ours, _OURS, strict=False)) | dict(zip(others, _OTHERS, strict=False))
    shapes = list(dict.fromkeys(entry["shape"] for entry in timings))
    ps = list(dict.fromkeys(entry["p"] for entry in timings))
    figure = Figure(figsize=(9.0, 0.9 + 0.75 * len(shapes) * len(ps)), layout="constrained")
    FigureCanvasAgg(figure)
    height = 0.85 / max(len(names), 1)
    for axes, p in zip(figure.subplots(len(ps), 1, squeeze=False)[:, 0], ps, strict=True):
        for slot, name in enumerate([*others, *(name for name in ours if name in names)]):
            ratios = {e["shape"]: e["ratio"] for e in timings if (e["name"], e["p"]) == (name, p)}
            places = [k + (slot - (len(names) - 1) / 2) * height for k, shape in enumerate(shapes) if shape in ratios]
            medians = [ratios[shape][1] for shape in shapes if shape in ratios]
            axes.barh(places, medians, height * 0.9, color=colours.get(name), label=name)
        axes.axvline(1.0, color="#333333", lw=0.8)
        axes.set_yticks(range(len(shapes)), shapes, fontsize=7)
        axes.invert_yaxis()
        axes.set_title(f"dropout {p:g}" if p else "no dropout", loc="left", fontsize=10)
        if p == ps[0]:
            axes.legend(fontsize=7, frameon=False, loc="best")
    device = document["device"]
    figure.suptitle("LoRA forward + backward over the frozen layer's (1 = F.linear with dx)", fontsize=11)
    figure.supxlabel(
        f"{device['name']}, {device['threads']} threads · torch {document['versions']['torch']} · "
        f"{document['date'][:10]} · median of {document['rounds']} interleaved rounds",
        fontsize=8,
    )
    write(figure, path)
