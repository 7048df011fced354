"""What is noted of a classifier that adapts to rotated digits in several ways, with its table and its curves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from _report import Curves
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table


@dataclass
class Results:
    """What came out of each way to adapt the model, by its name."""

    accuracy: dict[str, tuple[float, float]] = field(default_factory=dict)  # upright, rotated
    curves: dict[str, Curves] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    step_times: dict[str, list[float]] = field(default_factory=dict)  # seconds
    checks: dict[str, tuple[bool, str]] = field(default_factory=dict)  # whether it holds, and a remark

    def milliseconds(self, name: str) -> float:
        """Return the median time of a training step."""
        return 1e3 * statistics.median(self.step_times[name])

    def print_tables(self, title: str, column: str, told: Callable[[str], str]) -> None:
        """Print a line for each way, with one column of the caller's, whose text `told` returns; and the checks."""
        console = Console()
        table = Table("360 test digits", title=title, title_justify="left")
        for name in ("upright", "rotated", "trained", column, "a step,\nmedian"):
            table.add_column(name, justify="right")
        for name, (upright, rotated) in self.accuracy.items():
            rest = ["", "", ""]
            if name in self.parameters:
                rest = [f"{self.parameters[name]:,}", told(name), f"{self.milliseconds(name):.1f} ms"]
            table.add_row(name, f"{upright:.1%}", f"{rotated:.1%}", *rest)
        console.print(table)
        for what, (held, remark) in self.checks.items():
            console.print(f"  {'[green]yes[/]' if held else '[bold red]NO[/] '}  {what} ({remark})", highlight=False)

    def draw_curves(self, axes: Axes, colours: Mapping[str, str]) -> None:
        """Draw the accuracies on rotated digits over the steps, with their legend."""
        for name, curves in self.curves.items():
            axes.plot(curves.steps, [100 * value for value in curves.rotated], "o-", color=colours[name], label=name)
        axes.set(xlabel="training step", ylabel="accuracy on rotated test digits, %", ylim=(0, 104))
        axes.legend(frameon=False, loc="best")
