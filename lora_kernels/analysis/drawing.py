"""The style, the labels and the files of the pictures in `lora_kernels.analysis.plots`."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kernels.core import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "font.size": 8,
    "hatch.linewidth": 0.4,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,  # publishers refuse the fonts of type 3 that matplotlib embeds by default
    "svg.hashsalt": "lora_kernels",  # equal pictures are equal files
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextmanager
def figures() -> Iterator[Callable[[tuple[float, float]], Figure]]:
    """Yield a function that makes a figure of a size in inches. The style of the pictures is in force meanwhile."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield lambda size: Figure(figsize=size, layout="constrained")


def write(figure: Figure, path: str | os.PathLike[str], title: str, dpi: int) -> None:
    """Write the figure into the file, in the format of its suffix. Raises ValueError for a suffix that is no format."""
    path = Path(path)
    format = path.suffix.lower().removeprefix(".")
    formats = figure.canvas.get_supported_filetypes()
    if format not in formats:
        raise ValueError(f"{path}: the suffix must be a format of matplotlib: {', '.join(sorted(formats))}")
    if title:
        figure.suptitle(title)
    # A date would make equal pictures different files.
    dates: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    made = io.BytesIO()
    figure.savefig(made, format=format, dpi=dpi, metadata=dates.get(format))
    atomic.replace({path: made.getvalue()})


def hatch(axis: Axes) -> None:
    """Make the background grey and hatched, which shows where a map has no value."""
    axis.patch.set(facecolor="#eeeeee", hatch="/////", edgecolor="#aaaaaa", linewidth=0)


def ticks(n: int, most: int = 9) -> list[int]:
    """Return the numbers that an axis from 1 to n is labelled with: 1, and the multiples of a power of two."""
    step = 1
    while n // step > most:
        step *= 2
    return list(dict.fromkeys([1, *range(step, n + 1, step)]))


def step_of(n: int, cell: float) -> int:
    """Return the least k for which every k-th of n names has room, beside cells of this width in inches."""
    return max(1, math.ceil(0.16 / cell)) if n > 1 else 1


def short(name: str, most: int = 24) -> str:
    """Return the end of a long name, which tells layers apart, as a text in which matplotlib sees no formula."""
    return (name if len(name) <= most else "…" + name[1 - most :]).replace("$", r"\$")


def matrix(value: Any, what: str) -> Any:
    """Return the value as a matrix of floats. Raises ValueError for another shape."""
    import numpy as np

    made = np.asarray(value, dtype=float)
    if made.ndim != 2:
        raise ValueError(f"{what} must have two dimensions, got {list(made.shape)}")
    return made


def number(v: float, digits: int = 2) -> str:
    """Return a number in few characters, rounded to `digits` digits: 0.032, 1.4, 26, 3e-05, ∞."""
    if math.isinf(v):
        return "∞" if v > 0 else "-∞"
    if v == 0 or (float(v).is_integer() and abs(v) < 10_000):
        return f"{v:.0f}"
    if 0.001 <= abs(v) < 10 ** (digits - 1):
        return f"{v:#.{digits}g}".rstrip(".")
    return f"{v:.0f}" if 10 <= abs(v) < 10_000 else f"{v:.0e}"
