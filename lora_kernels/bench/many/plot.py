"""The picture of the suite `many`: time over the number of adapters in decoding, and training over the frozen layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kernels.bench.many.cells import DECODE, FLOOR, FROZEN, LOOP, ONE, OURS, OWN, PEFT, SWITCHED, TRAINING
from lora_kernels.bench.many.report import groups, size
from lora_kernels.bench.plot import write
from lora_kernels.bench.report import Document

_COLOURS = {
    FROZEN: "#333333",
    PEFT: "#8c8c8c",
    SWITCHED: "#bdb8ad",
    LOOP: "#8ab6d6",
    FLOOR: "#d9a441",
    OWN: "#6a9f58",
    ONE: "#5f8fb4",
    OURS: "#2a6f97",
}
_SLOTS = {PEFT: 0, SWITCHED: 1, LOOP: 2, ONE: 2, FLOOR: 3, OURS: 4}
"""The places of the bars of a cell. A cell has only one of the two that share a place."""
_PANELS = 3
"""The panels of a row: the numbers of rows in decoding."""


def draw(document: Document, path: Path) -> None:
    """Write a PNG: for each dtype a row of panels for decoding, one for each number of rows, and a panel of bars for
    training. Raises ImportError if matplotlib is not installed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [group for group in groups(document) if group[0] in (DECODE, TRAINING)]
    figure = Figure(figsize=(12.0, 0.9 + 3.0 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(found), _PANELS)
    for i, (kind, dtype) in enumerate(sorted(found, key=lambda group: group[0])):
        cells = {name: c for name, c in document["cells"].items() if (c["kind"], c["dtype"]) == (kind, dtype)}
        if kind == TRAINING:
            _bars(figure.add_subplot(grid[i, :]), document, cells, dtype)
            continue
        for j, M in enumerate(list(dict.fromkeys(cell["M"] for cell in cells.values()))[:_PANELS]):
            mine = {name: cell for name, cell in cells.items() if cell["M"] == M}
            _lines(figure.add_subplot(grid[i, j]), document, mine, f"decoding, {M} rows, {dtype}", legend=not j)
    device = document["device"]
    figure.suptitle("One layer with many adapters in a batch", fontsize=11)
    figure.supxlabel(
        f"{device['name']}, {device['threads']} threads · torch {document['versions']['torch']} · "
        f"{document['date'][:10]} · median of {document['rounds']} interleaved rounds, whiskers: quartiles",
        fontsize=8,
    )
    write(figure, path)


def _lines(axes: Any, document: Document, cells: dict[str, dict[str, Any]], title: str, legend: bool) -> None:
    """Draw the time of each method over the number of adapters."""
    for method, colour in _COLOURS.items():
        mine = [e for e in document["timings"] if e["cell"] in cells and e["method"] == method]
        points = sorted((cells[e["cell"]]["n"], *(1e3 * t for t in e["seconds"])) for e in mine)
        if not points:
            continue
        ns, lows, middles, highs = zip(*points, strict=True)
        below = [m - v for m, v in zip(middles, lows, strict=True)]
        above = [v - m for m, v in zip(middles, highs, strict=True)]
        thick = method == OURS
        style: dict[str, Any] = {"lw": 2.2 if thick else 1.2, "ms": 5 if thick else 4, "capsize": 0, "elinewidth": 0.8}
        axes.errorbar(
            ns, middles, [below, above], fmt="--" if method == FROZEN else "o-", color=colour, label=method, **style
        )
    counts = sorted({cell["n"] for cell in cells.values()})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlabel("adapters", fontsize=8)
    axes.set_ylabel("ms", fontsize=8)
    axes.set_title(title, loc="left", fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=7, frameon=False)


def _bars(axes: Any, document: Document, cells: dict[str, dict[str, Any]], dtype: str) -> None:
    """Draw forward + backward over that of the frozen layer."""
    width, top, names = 0.85 / len(set(_SLOTS.values())), 1.0, list(cells)
    for method, slot in _SLOTS.items():
        entries = {e["cell"]: e for e in document["timings"] if e["cell"] in cells and e["method"] == method}
        places = [k for k, name in enumerate(names) if name in entries]
        if not places:
            continue
        ratios = [entries[names[k]]["ratio"] for k in places]
        errors = [[r[1] - r[0] for r in ratios], [r[2] - r[1] for r in ratios]]
        xs = [k + (slot - max(_SLOTS.values()) / 2) * width for k in places]
        more = {"yerr": errors, "error_kw": {"lw": 0.7, "ecolor": "#333333"}}
        bars = axes.bar(xs, [r[1] for r in ratios], width * 0.92, color=_COLOURS[method], label=method, **more)
        axes.bar_label(bars, [f"{r[1]:.2f}" for r in ratios], fontsize=6, padding=2)
        top = max(top, *(r[2] for r in ratios))
    axes.axhline(1.0, color="#333333", lw=0.8)
    axes.set_ylim(0, 1.25 * top)
    axes.set_xticks(range(len(names)), [size(cells[name]) for name in names], fontsize=7)
    axes.set_title(f"training, {dtype}: adapters × rows of each, over F.linear's fwd + bwd", loc="left", fontsize=9)
    axes.legend(fontsize=7, frameon=False, ncols=len(_SLOTS), loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
