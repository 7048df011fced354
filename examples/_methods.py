"""The table and the picture that examples/training_methods.py shows at its end."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from _report import STYLE
from _sweep import words
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from training_methods import Results

LOOKS = {
    "LoRA": ("#000000", "o"),
    "LoRA, rank 8": ("#7f7f7f", "o"),
    "LoRA+": ("#D55E00", "s"),
    "LoRA-FA": ("#0072B2", "^"),
    "LoRA-FA, unprojected": ("#56B4E9", "v"),
    "ResLoRA, block": ("#009E73", "D"),
    "ResLoRA, input": ("#CC79A7", "P"),
    "ResLoRA, middle": ("#E69F00", "X"),
}
"""Colours and marks of the methods, which differ in print without colours too."""
PANELS = (
    ("a higher rate for B, or a higher rank", ("LoRA", "LoRA, rank 8", "LoRA+")),
    ("A frozen", ("LoRA", "LoRA-FA", "LoRA-FA, unprojected")),
    ("shortcuts between blocks", ("LoRA", "ResLoRA, block", "ResLoRA, input", "ResLoRA, middle")),
)


def last(results: Results, name: str) -> list[float]:
    """Return the accuracies at the end, of each seed."""
    return [run.accuracies[-1] for run in results.best(name)]


def print_table(results: Results) -> None:
    lengths = results.lengths
    title = f"{lengths.steps} steps, mean and half the range of {lengths.seeds} seeds"
    table = Table(title=title, title_justify="left")
    table.add_column("rotated digits", no_wrap=True)
    for column in ("lr", "accuracy, %", "trained", "kept for\nbackward", "time of\na step"):
        table.add_column(column, justify="right")
    for name in results.runs:
        table.add_row(
            name,
            f"{results.rate(name):g}",
            words(last(results, name)),
            f"{results.parameters[name]:,}",
            f"{results.saved[name] / 2**20:.2f} MiB",
            f"{results.ratio(name):.2f} x",
        )
    plain = {name: [run.as_lora for run in results.best(name) if run.as_lora is not None] for name in results.runs}
    plain = {name: values for name, values in plain.items() if values}
    console = Console()
    console.print(table)
    console.print(
        f"lr is the one of {', '.join(f'{rate:g}' for rate in lengths.rates)} with the least loss on held-out training "
        "images. That of LoRA+ is A's.\nAs plain LoRA, by `reslora_to_lora`: "
        + ", ".join(f"{name} {words(values)} %" for name, values in plain.items()),
        highlight=False,
    )


def plot(results: Results, path: Path) -> Path:
    """Draw the accuracy of each method over the steps, and at the end over what a forward keeps for its backward."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 4, figsize=(13, 4), width_ratios=(1, 1, 1, 1.15))
        for (title, names), panel in zip(PANELS, axes, strict=False):
            panel.sharey(axes[0])
            for name in names:
                _over_steps(panel, results, name)
            panel.legend(frameon=False, loc="lower right", fontsize=9)
            panel.set(xlabel="training step", title=title)
            panel.title.set(fontsize=10)
        axes[0].set(ylabel="accuracy on rotated test digits, %")
        for name in results.runs:
            _over_bytes(axes[3], results, name)
        axes[3].set(xlabel="kept for the backward, MiB", title="at the end")
        axes[3].margins(x=0.15)
        axes[3].legend(frameon=False, loc="lower center", fontsize=9)
        axes[3].title.set(fontsize=10)
        seeds = results.lengths.seeds
        figure.suptitle(
            "Methods to train an adapter of rank 4, each at its best learning rate, "
            f"{results.lengths.steps} steps, mean and range of {seeds} seeds",
            fontsize=12,
            fontweight="bold",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _over_steps(axes: Axes, results: Results, name: str) -> None:
    colour, mark = LOOKS[name]
    seeds = zip(*(run.accuracies for run in results.best(name)), strict=True)
    values = [[100 * value for value in at] for at in seeds]
    steps = [results.lengths.every * (i + 1) for i in range(len(values))]
    label = f"{name}, lr {results.rate(name):g}"
    axes.plot(steps, list(map(statistics.fmean, values)), f"{mark}-", color=colour, markersize=5, label=label)
    axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0)


def _over_bytes(axes: Axes, results: Results, name: str) -> None:
    colour, mark = LOOKS[name]
    values = [100 * value for value in last(results, name)]
    at, mean = results.saved[name] / 2**20, statistics.fmean(values)
    axes.plot([at, at], [min(values), max(values)], color=colour, alpha=0.5, linewidth=1.2)
    axes.plot(at, mean, mark, color=colour, markersize=8, label=name)
