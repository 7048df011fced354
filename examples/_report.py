"""The tables and the picture that examples/digits.py shows at its end."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from digits import Results

UPRIGHT, ROTATED, LOSS = "#2b6cb0", "#dd6b20", "#4a5568"
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
}


@dataclass
class Curves:
    """The curves of one training: the loss of every step, and test accuracies before the first epoch and after each."""

    loss: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    upright: list[float] = field(default_factory=list)
    rotated: list[float] = field(default_factory=list)

    def add_accuracy(self, upright: float, rotated: float) -> None:
        self.steps.append(len(self.loss))
        self.upright.append(upright)
        self.rotated.append(rotated)


def print_tables(results: Results) -> None:
    console = Console()

    table = Table("accuracy on 360 test images", title_justify="left")
    table.add_column("upright", justify="right")
    table.add_column("rotated", justify="right")
    for name, (upright, rotated) in results.accuracy.items():
        table.add_row(name, f"{upright:.1%}", f"{rotated:.1%}")
    console.print(table)
    for what, (held, remark) in results.checks.items():
        console.print(f"  {'[green]yes[/]' if held else '[bold red]NO[/] '}  {what} ({remark})", highlight=False)

    table = Table("size")
    table.add_column("parameters", justify="right")
    table.add_column("on disk", justify="right")
    table.add_column("of the model", justify="right")
    for name, (parameters, size) in results.sizes.items():
        table.add_row(name, f"{parameters:,}", f"{size / 1024:,.0f} KiB", f"{size / results.sizes['model'][1]:.1%}")
    console.print(table)

    table = Table("training step")
    for column in ("median", "middle half", "ratio"):
        table.add_column(column, justify="right")
    medians = {name: statistics.median(times) for name, times in results.step_times.items()}
    floor = next(iter(medians.values()))
    for name, times in results.step_times.items():
        low, _, high = statistics.quantiles(times, n=4)
        middle, ratio = f"{1e3 * low:.1f} to {1e3 * high:.1f} ms", f"{medians[name] / floor:.2f} x"
        table.add_row(name, f"{1e3 * medians[name]:.1f} ms", middle, ratio)
    console.print(table)


def plot(pretraining: Curves, adaptation: Curves, off: float, path: Path) -> Path:
    """Draw loss above accuracy, one training after the other. `off` is the upright accuracy with the adapter off."""
    start = len(pretraining.loss)
    end = start + len(adaptation.loss)
    with plt.rc_context(STYLE):
        figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6.4), sharex=True, height_ratios=(2, 3))
        for offset, curves in ((0, pretraining), (start, adaptation)):
            steps = range(offset + 1, offset + len(curves.loss) + 1)
            above.plot(steps, curves.loss, color=LOSS, alpha=0.2, linewidth=0.8)
            above.plot(steps, _smooth(curves.loss), color=LOSS)
            epochs = [offset + step for step in curves.steps]
            below.plot(epochs, [100 * value for value in curves.upright], "o-", color=UPRIGHT)
            below.plot(epochs, [100 * value for value in curves.rotated], "o-", color=ROTATED)
        below.plot([start, end], [100 * off, 100 * off], "--", color=UPRIGHT)
        labels = ["upright digits", "rotated digits", "upright digits, adapter off"]
        handles = [below.lines[0], below.lines[1], below.lines[-1]]
        below.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
        above.set(ylabel="training loss", ylim=(0, None), xlim=(0, 1.01 * end))
        below.set(ylabel="test accuracy, %", xlabel="training step", ylim=(0, 104))
        _name_phase(above, start / 2, "pretrain: all weights, upright digits")
        _name_phase(above, (start + end) / 2, "adapt: LoRA only, rotated digits")
        for axes in (above, below):
            axes.axvspan(start, 1.01 * end, color=ROTATED, alpha=0.06, linewidth=0)
        figure.suptitle("A digit classifier learns rotated digits through LoRA", fontsize=13, fontweight="bold")
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _name_phase(axes: Axes, middle: float, text: str) -> None:
    axes.text(middle, 1.02, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom", color=LOSS)


def _smooth(values: list[float], reach: int = 8) -> list[float]:
    """Return the mean of each value and up to `reach` neighbours on either side."""
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
