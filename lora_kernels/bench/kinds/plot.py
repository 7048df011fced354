"""The picture of the suite `kinds`: for each kind of layer, the time of each way over the frozen layer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kernels.bench.kinds.cells import FROZEN, OURS, PEFT
from lora_kernels.bench.kinds.report import kinds, size
from lora_kernels.bench.plot import write
from lora_kernels.bench.report import Document

_COLOURS = {PEFT: "#8c8c8c", OURS: "#2a6f97"}
_OTHERS = ("#d9a441", "#6a9f58", "#8ab6d6")
"""The colours of further ways."""


def draw(document: Document, path: Path) -> None:
    """Write a PNG with a panel of bars for each kind. Raises ImportError if matplotlib is not installed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = kinds(document)
    heights = [1.2 + 0.42 * sum(cell["kind"] == kind for cell in document["cells"].values()) for kind in found]
    figure = Figure(figsize=(9.0, 0.8 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, kind in zip(panels, found, strict=True):
        _panel(axes, document, kind)
    device = document["device"]
    figure.suptitle("Layers with an adapter: time over the frozen layer's", fontsize=11)
    figure.supxlabel(
        f"{device['name']}, {device['threads']} threads · torch {document['versions']['torch']} · "
        f"{document['date'][:10]} · median of {document['rounds']} interleaved rounds, whiskers: quartiles",
        fontsize=8,
    )
    write(figure, path)


def _panel(axes: Any, document: Document, kind: str) -> None:
    cells = {name: cell for name, cell in document["cells"].items() if cell["kind"] == kind}
    entries = [e for e in document["timings"] if e["cell"] in cells and e["way"] != FROZEN]
    ways = sorted(dict.fromkeys(e["way"] for e in entries), key=lambda way: (way == OURS, way != PEFT))
    colours = _COLOURS | dict(zip((way for way in ways if way not in _COLOURS), _OTHERS, strict=False))
    height, names = 0.8 / max(len(ways), 1), list(cells)
    for slot, way in enumerate(ways):
        ratios = {e["cell"]: e["ratio"] for e in entries if e["way"] == way}
        places = [k for k, name in enumerate(names) if name in ratios]
        values = [ratios[names[k]] for k in places]
        errors = [[v[1] - v[0] for v in values], [v[2] - v[1] for v in values]]
        ys = [k + (slot - (len(ways) - 1) / 2) * height for k in places]
        more = {"xerr": errors, "error_kw": {"lw": 0.7, "ecolor": "#333333"}}
        bars = axes.barh(ys, [v[1] for v in values], height * 0.9, color=colours.get(way), label=way, **more)
        axes.bar_label(bars, [f"{v[1]:.2f}" for v in values], fontsize=6, padding=3)
    if max((e["ratio"][1] for e in entries), default=1) > 20:
        axes.set_xscale("log")
    axes.axvline(1.0, color="#333333", lw=0.8)
    axes.margins(x=0.1)
    axes.set_yticks(range(len(names)), [size(cells[name]) for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_title(kind, loc="left", fontsize=9)
    axes.legend(fontsize=7, frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
