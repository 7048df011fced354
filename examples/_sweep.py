"""The tables and the picture that examples/rank_sweep.py shows at its end."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from _report import LOSS, STYLE
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

Document = dict[str, Any]
LOOKS = (("#b45309", "o"), ("#0f766e", "s"), ("#2b6cb0", "^"), ("#6b21a8", "D"))
"""Colours and marks of the choices, which differ in print without colours too."""


def lines(document: Document) -> Iterator[tuple[str, list[Document]]]:
    """Yield the points of each choice of weights, by rank."""
    for name in dict.fromkeys(point["weights"] for point in document["points"]):
        yield name, [point for point in document["points"] if point["weights"] == name]


def is_equal(document: Document, point: Document) -> bool:
    """Return whether a point is that of its choice at equal cost."""
    return bool(document["equal"]["ranks"][point["weights"]] == point["r"])


def print_tables(document: Document) -> None:
    console = Console()
    points = {(point["weights"], point["r"]): point["accuracies"] for point in document["points"]}
    names = [name for name, _ in lines(document)]
    ranks = sorted({r for _, r in points if sum((name, r) in points for name in names) == len(names)})
    table = Table("accuracy, %")
    for r in ranks:
        table.add_column(f"r {r}", justify="right")
    table.add_column("± at most", justify="right")
    for name in names:
        _add(table, name, {r: points[name, r] for r in ranks}, ranks)
    cut = document["cut"]
    own = {point["r"]: point["accuracies"] for point in cut["points"]}
    _add(table, f"{cut['weights']}, cut from {cut['from']}", own, ranks)
    console.print(table)

    table = Table(f"at most {document['equal']['parameters']:,} parameters")
    for column in ("rank", "parameters", "accuracy, %"):
        table.add_column(column, justify="right")
    for point in document["points"]:
        if is_equal(document, point):
            table.add_row(point["weights"], str(point["r"]), f"{point['parameters']:,}", words(point["accuracies"]))
    console.print(table)

    setting, same = document["setting"], document["similarity"]
    phi, (low, high) = same["phi"], same["ranks"]
    console.print(
        f"without an adapter: {setting['rotated']:.1%} on rotated digits, {setting['upright']:.1%} on upright ones",
        f"φ(i, i) of the updates of rank {low} and rank {high} of {same['layer']}: "
        + ", ".join(f"{phi[i - 1][i - 1]:.2f} ({i / same['d']:.2f} at random) for i = {i}" for i in (1, 2, low)),
        sep="\n",
        highlight=False,
    )


def _add(table: Table, name: str, values: dict[int, list[float]], ranks: list[int]) -> None:
    """Add a row of means, with the largest spread at its end."""
    told = {r: words(accuracies).split(" ±") for r, accuracies in values.items()}
    table.add_row(
        name, *(told[r][0] if r in told else "" for r in ranks), max((s for _, s in told.values()), key=float)
    )


def words(accuracies: list[float]) -> str:
    """Return the mean over the seeds in percent, and half the distance between the lowest and the highest."""
    return f"{100 * statistics.fmean(accuracies):.1f} ±{50 * (max(accuracies) - min(accuracies)):.1f}"


def plot(document: Document, path: Path) -> Path:
    """Draw accuracy over the rank and over the parameters, and the similarity of two adapters."""
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 4), width_ratios=(5, 5, 4.4))
        for (name, points), (colour, mark) in zip(lines(document), LOOKS, strict=True):
            values = [[100 * value for value in point["accuracies"]] for point in points]
            for axes, key in ((left, "r"), (middle, "parameters")):
                x = [point[key] for point in points]
                axes.plot(x, list(map(statistics.fmean, values)), f"{mark}-", color=colour, markersize=5, label=name)
                axes.fill_between(
                    x, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0
                )
            at = next(i for i, point in enumerate(points) if is_equal(document, point))
            middle.plot(
                points[at]["parameters"],
                statistics.fmean(values[at]),
                "o",
                color="black",
                fillstyle="none",
                markersize=11,
            )
        cut = document["cut"]
        (colour, _), *_ = (
            looks for (name, _), looks in zip(lines(document), LOOKS, strict=True) if name == cut["weights"]
        )
        means = [100 * statistics.fmean(point["accuracies"]) for point in cut["points"]]
        label = f"{cut['weights']}, cut from {cut['from']}"
        left.plot([point["r"] for point in cut["points"]], means, "x--", color=colour, markersize=6, label=label)
        ranks = sorted({point["r"] for point in document["points"]} & {2**i for i in range(10)})
        left.set(xscale="log", xlabel="rank r", ylabel="accuracy on rotated test digits, %")
        left.set_xticks(ranks, [str(r) for r in ranks])
        left.minorticks_off()
        middle.legend(handles=left.lines, frameon=False, loc="lower right", fontsize=9)  # there is more room
        middle.axvline(document["equal"]["parameters"], color=LOSS, linestyle=":", linewidth=1.2)
        middle.set(xscale="log", xlabel="trained parameters", title="circles: the best rank within the dotted line")
        middle.title.set(fontsize=9, color=LOSS)
        middle.sharey(left)
        _similarity(right, document["similarity"])
        seeds, steps = document["setting"]["seeds"], document["setting"]["steps"]
        figure.suptitle(
            "Which weights, and at which rank? LoRA on a small vision transformer, "
            f"{steps} steps, mean and range of {seeds} seeds",
            fontsize=12,
            fontweight="bold",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _similarity(axes: Axes, same: Document) -> None:
    """Draw φ(i, j) with its values."""
    phi, (low, high) = np.array(same["phi"]), same["ranks"]
    axes.imshow(phi, cmap="Blues", vmin=0, vmax=1, origin="lower")
    for (i, j), value in np.ndenumerate(phi):
        colour = "white" if value > 0.55 else "black"
        axes.text(j, i, f"{value:.2f}".removeprefix("0"), ha="center", va="center", fontsize=6.5, color=colour)
    ticks = range(low)
    axes.set_xticks(ticks, [str(i + 1) for i in ticks])
    axes.set_yticks(ticks, [str(i + 1) for i in ticks])
    axes.grid(visible=False)
    axes.set(xlabel=f"first j directions of rank {high}", ylabel=f"first i directions of rank {low}")
    axes.set_title(f"φ(i, j) of {same['layer']}; at random max(i, j) / {same['d']}", fontsize=9, color=LOSS)
