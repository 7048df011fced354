"""The table and the picture that examples/pretrain_relora.py shows at its end, of the document of its results."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from _report import LOSS, ROTATED, STYLE, UPRIGHT
from rich.console import Console
from rich.table import Table

SHOWN = "model.layers.1.self_attn.q_proj"
COLOURS = {"full rank": LOSS, "LoRA": ROTATED, "ReLoRA": UPRIGHT}
WITHOUT = ("#c05621", "#319795", "#805ad5")
"""The colours of ReLoRA without one of its parts."""


def by_method(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the entries of each way, in the order of the document."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in document["runs"]:
        found.setdefault(entry["method"], []).append(entry)
    return found


def spread(values: list[float]) -> str:
    """Return the mean, and the standard deviation if there are several values."""
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def print_table(document: dict[str, Any]) -> None:
    start = spread([each["perplexity"] for each in document["starts"]])
    table = Table(
        "after the warm start", title=f"Perplexity of a byte of held-out text, {start} before", title_justify="left"
    )
    for column in ("perplexity", "learning\nrate", "trained", "effective\nrank of ΔW", "σ above 1 %\nof σ₁", "a step"):
        table.add_column(column, justify="right")
    for name, entries in by_method(document).items():
        first = entries[0]
        table.add_row(
            name,
            spread([each["perplexity"] for each in entries]),
            f"{first['rate']:g}",
            f"{first['trained']:,}",
            f"{statistics.fmean(each['effective_rank'] for each in entries):.1f}",
            f"{statistics.fmean(each['above'] for each in entries):.1f}",
            f"{1e3 * statistics.median(each['seconds'][1] for each in entries):.1f} ms",
        )
    console = Console()
    console.print(table)
    taken = [each["restart_seconds"] for each in document["runs"] if each["restart_seconds"] is not None]
    if taken:
        console.print(f"A restart of the whole model took {1e3 * statistics.median(taken):.1f} ms.", highlight=False)


def plot(document: dict[str, Any], path: Path) -> Path:
    """Draw perplexities over steps with the restarts, beside the singular values of one ΔW, of the first seed."""
    settings = document["settings"]
    entries = {name: found[0] for name, found in by_method(document).items()}
    others = iter(WITHOUT)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.6), width_ratios=(3, 2))
        for name, entry in entries.items():
            steps, values = zip(*entry["curve"], strict=True)
            whole = name in COLOURS
            look = {"color": COLOURS[name]} if whole else {"color": next(others), "linestyle": "--", "linewidth": 1.2}
            left.plot(steps, values, label=name, **look)
            if whole:
                right.plot(range(1, len(entry["spectra"][SHOWN]) + 1), entry["spectra"][SHOWN], label=name, **look)
        for step in range(settings["every"], settings["steps"], settings["every"]):
            left.axvline(step, color=UPRIGHT, alpha=0.25, linewidth=0.8, linestyle=":", zorder=0)
        # The first steps would take most of the height.
        late = [value for e in entries.values() for step, value in e["curve"] if step >= settings["every"]]
        left.set(xlabel="step after the warm start; dotted: restarts", ylabel="perplexity of a byte, held out")
        left.set(xlim=(0, settings["steps"]), ylim=(0.95 * min(late), 1.05 * max(late)))
        left.legend(frameon=False)
        largest = max(values[0] for e in entries.values() if (values := e["spectra"][SHOWN]))
        right.set(xlabel="index", ylabel="singular value of ΔW", yscale="log", ylim=(1e-4 * largest, 2 * largest))
        right.set_title(SHOWN.removeprefix("model."), fontsize=10)
        right.legend(frameon=False)
        figure.suptitle("Pretraining in full, with LoRA and with ReLoRA", fontsize=13, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path
