"""The pictures of a run: forward + backward over the frozen layer, by shape and variant; and time over the roofline's
floor, by M and by R."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from lora_kernels.bench.shapes import BACKWARD, FORWARD, GRAPH
from lora_kernels.core import atomic

_BASELINES = {"PEFT": "#8c8c8c", "addmm_": "#d9a441", "merge": "#c05b4d"}
_OURS = "#2a6f97"


def draw_all(document: dict[str, Any], path: Path) -> list[Path]:
    """Draw every picture that a document has, and return their paths.

    A document with a training shape has the picture of `draw`, at `path`. One with `sweeps` has that of
    `draw_roofline`, in <name>-roofline.png beside it. Raises ImportError if matplotlib is not installed.
    """
    drawn = []
    if any(e["pass"] == BACKWARD for e in document["timings"]):
        draw(document, path)
        drawn.append(path)
    if sweeps(document):
        roofline = path.with_name(f"{path.stem}-roofline.png")
        draw_roofline(document, roofline)
        drawn.append(roofline)
    return drawn


def draw(document: dict[str, Any], path: Path) -> None:
    """Write a PNG with one panel for each p. Raises ImportError if matplotlib is not installed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mine = ours(document)
    timings = [
        e for e in document["timings"] if e["pass"] == BACKWARD and (e["variant"] in _BASELINES or e["variant"] in mine)
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
    write(figure, path)


def write(figure: Any, path: Path) -> None:
    """Write a figure to `path` as a whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:] or None, dpi=130)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace({path: image.getvalue()})


def ours(document: dict[str, Any]) -> set[str]:
    """Return the variants that stand for this package in a picture: the automatic choice, or our first back-end if the
    automatic choice was not measured."""
    names = [e["variant"] for e in document["timings"] if e["backend"]]
    return {e["variant"] for e in document["timings"] if e["automatic"]} or set(names[:1])


def _panel(axes: Any, timings: list[dict[str, Any]], shapes: list[str], described: dict[str, Any]) -> None:
    order = [*_BASELINES, "ours"]
    width = 0.8 / len(order)
    top = 1.0
    for j, name in enumerate(order):
        entries = {e["shape"]: e for e in timings if (e["backend"] if name == "ours" else e["variant"] == name)}
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
    # The size names the dtype of the adapters. With it in the name too, neighbouring names would overlap.
    labels = [f"{s.removesuffix('-fp32-adapters')}\n{described[s]['size']}".replace(", ", "\n") for s in shapes]
    axes.set_xticks(range(len(shapes)), labels, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def sweeps(document: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the sweeps to draw, as ("M" or "R", names of shapes).

    A sweep is the largest set of shapes that differ only in M, or only in R. It needs three values at least, and a run
    that has measured the roofline.
    """
    found = []
    for axis in ("M", "R"):
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, shape in document["shapes"].items():
            same = tuple(shape[key] for key in ("M", "N", "K", "R", "dtype", "adapter_dtype") if key != axis)
            groups.setdefault(same, []).append(name)
        largest = max(groups.values(), key=len, default=[])
        if len({document["shapes"][name][axis] for name in largest}) >= 3 and document.get("roofline"):
            found.append((axis, largest))
    return found


def draw_roofline(document: dict[str, Any], path: Path) -> None:
    """Write a PNG with a panel for each sweep and pass: time / floor of every variant, without dropout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    passes = [which for which in (FORWARD, GRAPH, BACKWARD) if any(e["pass"] == which for e in document["timings"])]
    found = sweeps(document)
    figure = Figure(figsize=(5.2 * len(passes), 3.6 * len(found) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(found), len(passes), squeeze=False)
    for row, (axis, shapes) in zip(grid, found, strict=True):
        for axes, which in zip(row, passes, strict=True):
            _roofline_panel(axes, document, axis, shapes, which)
    figure.suptitle(
        f"{document['device']['name']}: time over the roofline's floor (1 = the measured GEMM or copy rate)"
    )
    write(figure, path)


def _roofline_panel(axes: Any, document: dict[str, Any], axis: str, shapes: list[str], which: str) -> None:
    entries = [e for e in document["timings"] if e["shape"] in shapes and e["pass"] == which and e["p"] == 0]
    for name in dict.fromkeys(e["variant"] for e in entries):
        mine = sorted((e for e in entries if e["variant"] == name), key=lambda e: document["shapes"][e["shape"]][axis])
        axes.plot(
            [document["shapes"][e["shape"]][axis] for e in mine],
            [e["seconds"][1] / e["floor"]["seconds"] for e in mine],
            "o-" if mine[0]["backend"] else "x--",
            color=_OURS if name in ours(document) else _BASELINES.get(name),
            lw=1.2,
            ms=4,
            label=name,
        )
    axes.axhline(1.0, color="#333333", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel(f"{axis} ({document['shapes'][shapes[0]]['size']}, and other {axis})", fontsize=8)
    axes.set_ylabel("time / floor", fontsize=8)
    axes.set_title(which, loc="left", fontsize=9)
    axes.grid(alpha=0.25)
    if entries:
        axes.legend(fontsize=7, frameon=False)
