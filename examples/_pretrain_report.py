"""The table and the picture that examples/pretrain_relora.py shows at its end, of the document of its results."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from _report import LOSS, ROTATED, STYLE, UPRIGHT
from matplotlib.axes import Axes

from lora_kernels.testing.terminal import terminal

SHOWN = "model.layers.1.self_attn.q_proj"
"""The layer whose ΔW is drawn."""
COLOURS = {"full rank": LOSS, "LoRA": ROTATED, "ReLoRA": UPRIGHT}
WITHOUT = ("#d69e2e", "#319795", "#805ad5")
"""The colours of ReLoRA without one of its parts, in the order of the document."""


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each way, with the means over the seeds, and the standard deviation of the perplexity."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["method"], []).append(run)
    return [
        {
            "method": name,
            "rate": each[0]["rate"],
            "trained": each[0]["trained"],
            "perplexity": spread([run["perplexity"] for run in each]),
            "effective_rank": statistics.fmean(run["effective_rank"] for run in each),
            "above": statistics.fmean(run["above"] for run in each),
            "seconds": statistics.median(run["seconds"][1] for run in each),
        }
        for name, each in found.items()
    ]


def spread(values: list[float]) -> list[float]:
    """Return the mean of the values and, if there are several, their standard deviation."""
    return [statistics.fmean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]


def told(perplexity: list[float]) -> str:
    return " ± ".join(f"{value:.2f}" for value in perplexity)


def print_table(document: dict[str, Any]) -> None:
    before = told(spread([start["perplexity"] for start in document["starts"]]))
    header = ("", "perplexity", "learning rate", "trained", "effective rank of ΔW", "σ > 1 % of σ₁", "a step")
    rows = [
        (
            row["method"],
            told(row["perplexity"]),
            f"{row['rate']:g}",
            f"{row['trained']:,}",
            f"{row['effective_rank']:.1f}",
            f"{row['above']:.1f}",
            f"{1e3 * row['seconds']:.1f} ms",
        )
        for row in document["rows"]
    ]
    show = terminal()
    show.table(f"Perplexity of a byte of held-out text, {before} after the warm start", header, rows)
    taken = [run["restart_seconds"] for run in document["runs"] if run["restart_seconds"] is not None]
    show.line(f"A restart of all layers takes {1e3 * statistics.median(taken):.1f} ms.")


def plot(document: dict[str, Any], path: Path) -> Path:
    """Draw perplexities over the steps, with the restarts, beside the singular values of one ΔW; of the first seed."""
    others = iter(WITHOUT)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.6), width_ratios=(3, 2))
        for run in document["runs"][: len(document["rows"])]:
            name, curve, values = run["method"], run["curve"], run["spectrum"]
            steps = [i * document["settings"]["measure"] for i in range(len(curve))]
            if name in COLOURS:
                left.plot(steps, curve, label=name, color=COLOURS[name])
                right.plot(range(1, len(values) + 1), values, label=name, color=COLOURS[name])
            else:
                left.plot(steps, curve, "--", label=name, color=next(others), linewidth=1.2)
        _finish_curves(left, document)
        largest = max(line.get_ydata()[0] for line in right.lines)
        right.set(yscale="log", ylim=(1e-4 * largest, 2 * largest), xlabel="number of the singular value")
        right.set_ylabel(f"singular value of ΔW, {SHOWN.removeprefix('model.')}")
        right.legend(frameon=False)
        figure.suptitle("Pretraining in full, with LoRA and with ReLoRA", fontsize=13, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _finish_curves(axes: Axes, document: dict[str, Any]) -> None:
    settings = document["settings"]
    steps, every = settings["steps"], settings["every"]
    for step in range(every, steps, every):
        axes.axvline(step, color=UPRIGHT, alpha=0.35, linewidth=0.9, linestyle=":", zorder=0)
    # The first steps, which are alike, would take most of the height.
    late = [value for line in axes.lines for step, value in line.get_xydata() if every <= step and value > 1]
    axes.set(xlim=(0, steps), ylim=(0.95 * min(late), 1.05 * max(late)))
    axes.set_xlabel("step after the warm start (dotted: restarts)")
    axes.set_ylabel("perplexity of a byte, other text than the table's")
    axes.legend(frameon=False, loc="upper right")
