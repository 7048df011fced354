"""Pictures of what adapters have learned, which a paper can print: similarities of subspaces, spectra, maps of layers.

Every function takes plain data (NumPy arrays, lists or tensors) and writes one file, whose suffix gives the format:
.png, .pdf, .svg or another of matplotlib's. The colours can be told apart by people with colour vision deficiencies and
in grey. matplotlib must be installed; no display is needed, and no state of pyplot is touched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_kernels.analysis.drawing import figures, hatch, matrix, number, short, step_of, ticks, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAP = "viridis"
_LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#B2A300")
"""The colours of lines (Okabe and Ito, 2008), with the yellow darkened, which is hard to see on white."""
_DASHES = ("-", "--", ":", "-.")
_FEW = 10
"""The most lines that are told apart one by one."""
_ZERO = 1e-13
"""A singular value is zero if it is this part of the largest, or less: what rounding in fp64 leaves of a zero."""


def plot_similarity(
    panels: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    random: Any = None,
    rows: str = "i",
    columns: str = "j",
    title: str = "",
    dpi: int = 200,
) -> None:
    """Draw φ(i, j) as heat maps with one colour bar from 0 to 1, as figures 3 and 4 of the LoRA paper show it
    (Hu et al., 2021, arXiv:2106.09685).

    Args:
        panels: φ [r1, r2] by the title of its panel. All have one shape. NaN, as beyond the rank of an update, is drawn
            hatched.
        path: the file to write, in a folder that exists.
        random: the φ [r1, r2] that unrelated subspaces have, for a last panel. A φ is large only beside it.
        rows, columns: what i (downwards) and j (to the right) count.
        title: of the whole picture.
        dpi: the resolution of a .png.

    Raises ValueError for no panels, arrays of other shapes, and a suffix that is no format.
    """
    import numpy as np

    shown = {name: matrix(value, f"the panel {name!r}") for name, value in panels.items()}
    if random is not None:
        shown["random (expected)"] = matrix(random, "random")
    shapes = {name: value.shape for name, value in shown.items()}
    if not panels or len(set(shapes.values())) > 1:
        raise ValueError(f"the panels must be one or more arrays [r1, r2] of one shape, got {shapes}")
    r1, r2 = next(iter(shapes.values()))
    wide = min(len(shown), 4)
    deep = math.ceil(len(shown) / wide)
    ratio = min(max(r1 / r2, 0.45), 1.6)  # of a panel's height to its width: a map of 1 × 64 is not a line
    side = 1.6 if len(shown) > 2 else 2.1
    with figures() as new:
        figure = new((wide * (side + 0.38) + 1.0, deep * (side * ratio + 0.52) + 0.25 + 0.25 * bool(title)))
        axes = figure.subplots(deep, wide, squeeze=False)
        drawn: Any = None
        for n, (axis, (name, value)) in enumerate(zip(axes.flat, shown.items(), strict=False)):
            extent = (0.5, r2 + 0.5, r1 + 0.5, 0.5)
            drawn = axis.imshow(
                np.ma.masked_invalid(value), cmap=_MAP, vmin=0, vmax=1, extent=extent, aspect="auto",
                interpolation="nearest",
            )  # fmt: skip
            axis.set_box_aspect(ratio)
            hatch(axis)
            axis.set(xticks=ticks(r2), yticks=ticks(r1, most=9 if ratio > 0.6 else 5))
            axis.set_title(short(name, int(13 * side) + 3))  # as long as a panel and its gap are wide
            if n % wide == 0:
                axis.set_ylabel(rows)
            if n + wide >= len(shown):
                axis.set_xlabel(columns)
        for axis in axes.flat[len(shown) :]:
            axis.set_axis_off()
        figure.colorbar(drawn, ax=axes, label="φ(i, j)", aspect=max(8, deep * side * ratio / 0.12))
        write(figure, path, title, dpi)


def plot_spectra(
    spectra: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    *,
    groups: Mapping[str, str] | None = None,
    effective: Mapping[str, float] | None = None,
    title: str = "",
    dpi: int = 200,
) -> None:
    """Draw the singular values of the updates ΔW on a logarithmic axis, a line for each layer.

    Args:
        spectra: the singular values by layer, from large to small. Zeros, which a logarithmic axis has no place for,
            are left out.
        path: the file to write, in a folder that exists.
        groups: the group of each layer, such as "q_proj". With more than 10 layers the lines are thin and have the
            colours of their groups, and the median of each group is drawn over them. Without groups the colours then
            follow the order of the layers.
        effective: the effective rank by layer, marked on its line where the layers are few.
        title, dpi: as for `plot_similarity`.

    Raises ValueError for no spectra, layers without a group, and a suffix that is no format.
    """
    import numpy as np

    if not spectra:
        raise ValueError("there are no spectra to draw")
    if groups is not None and (missing := [name for name in spectra if name not in groups]):
        raise ValueError(f"groups has no group for {', '.join(missing[:5])}" + ", ..." * (len(missing) > 5))
    lines = {name: _positive(np.asarray(values, dtype=float)) for name, values in spectra.items()}
    longest = max(len(np.atleast_1d(values)) for values in spectra.values())
    with figures() as new:
        figure = new((5.6, 3.4))
        axis = figure.subplots()
        few = len(lines) <= _FEW
        if few:
            _draw_each(axis, lines, effective or {})
        elif groups is not None:
            _draw_groups(axis, lines, groups)
        else:
            _draw_in_order(figure, axis, lines)
        if any(len(line) for line in lines.values()):
            axis.set_yscale("log")
        else:
            axis.text(0.5, 0.5, "every update is zero", ha="center", va="center", transform=axis.transAxes)
            axis.set_yticks([])
        axis.set(xlim=(1 - 0.03 * longest, longest * 1.03 + 0.03), xticks=ticks(longest))
        axis.set(xlabel="$i$", ylabel="singular value $\\sigma_i$ of ΔW")
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            figure.legend(loc="outside right upper", frameon=False)
        axis.set_title(title)  # over the axes, since a legend may stand beside them
        write(figure, path, "", dpi)


def plot_layers(
    values: Any,
    path: str | os.PathLike[str],
    *,
    blocks: Sequence[str],
    modules: Sequence[str],
    label: str,
    title: str = "",
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
    dpi: int = 200,
) -> None:
    """Draw one number for each layer as a map, with the blocks of the model to the right and their modules downwards.

    Args:
        values: [len(blocks), len(modules)]. NaN, where a block has no such module, is drawn hatched. Without `limits`,
            positive numbers over more than a factor of 30 get a logarithmic scale of colours.
        path: the file to write, in a folder that exists.
        blocks, modules: their names.
        label: what the numbers are, above the map.
        title, dpi: as for `plot_similarity`.
        reference: a number that a line in the colour bar marks, such as 1, or the value of random subspaces.
        limits: the ends of a linear scale of colours, such as (0, 1). None takes them from the values.

    Raises ValueError for values of another shape, and a suffix that is no format.
    """
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    value = matrix(values, "values")
    if value.shape != (len(blocks), len(modules)) or not value.size:
        raise ValueError(
            f"values must be [blocks, modules] = {[len(blocks), len(modules)]}, at least 1 × 1, got {list(value.shape)}"
        )
    value = value.T
    known = value[np.isfinite(value)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    if reference is not None:
        low, high = min(low, reference), max(high, reference)
    if high == low:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    wide_range = limits is None and low > 0 and high > 30 * low
    norm = LogNorm(low, high) if wide_range else Normalize(*(limits or (low, high)))
    cell = min(max(7.0 / len(blocks), 0.09), 0.55)
    names = 0.075 * max(map(len, map(short, modules)))
    with figures() as new:
        upright = all(len(name) * 0.07 < cell * step_of(len(blocks), cell) for name in blocks)
        below = 0.45 if upright else 0.35 + 0.065 * max(map(len, map(short, blocks)))
        if reference is not None:
            label = f"{label} (orange line: {number(reference)})"
        width, height = max(len(blocks) * cell, 1.0), max(len(modules) * 0.28, 0.9)
        wide = max(width + names + 0.9, 0.085 * len(label))
        figure = new((wide, height + below + 0.25 + 0.2 + 0.25 * bool(title)))
        axis = figure.subplots()
        drawn = axis.imshow(np.ma.masked_invalid(value), cmap=_MAP, norm=norm, aspect="auto", interpolation="nearest")
        hatch(axis)
        step = step_of(len(blocks), cell)
        axis.set_xticks(range(0, len(blocks), step), [short(name) for name in blocks[::step]])
        if not upright:
            axis.tick_params(axis="x", rotation=90)
        axis.set_yticks(range(len(modules)), [short(name) for name in modules])
        axis.tick_params(length=2)
        axis.set_xlabel("block")
        _number_cells(axis, value, drawn, cell)
        axis.set_title(label, loc="right")
        bar = figure.colorbar(drawn, ax=axis, aspect=max(8, height / 0.12), pad=0.02)
        if reference is not None:
            bar.ax.axhline(reference, color="#D55E00", linewidth=2, clip_on=False)
        write(figure, path, title, dpi)


def _draw_each(axis: Axes, lines: Mapping[str, Any], effective: Mapping[str, float]) -> None:
    """Draw a line for each layer, with its name, and a ring at its effective rank."""
    import numpy as np

    ringed = False
    for n, (name, line) in enumerate(lines.items()):
        colour, dashes = _LINES[n % len(_LINES)], _DASHES[n // len(_LINES) % len(_DASHES)]
        index = np.arange(1, len(line) + 1)
        shown = short(name, 28) + " (zero)" * (not len(line))
        axis.plot(index, line, dashes, color=colour, label=shown, linewidth=1.4, marker=".", markersize=4)
        rank = effective.get(name, math.nan)
        if len(line) and math.isfinite(rank):
            height = math.exp(np.interp(rank, index, np.log(line)))
            axis.plot(
                [rank], [height], "o", markersize=8, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.4
            )
            ringed = True
    if ringed:
        axis.plot(
            [], [], "o", markersize=8, markerfacecolor="none", markeredgecolor="#555555", markeredgewidth=1.4,
            label="effective rank",
        )  # fmt: skip


def _draw_groups(axis: Axes, lines: Mapping[str, Any], groups: Mapping[str, str]) -> None:
    """Draw thin lines in the colours of their groups, and the median of each group."""
    import numpy as np

    for n, group in enumerate(dict.fromkeys(groups[name] for name in lines)):
        own = [line for name, line in lines.items() if groups[name] == group]
        colour, dashes = _LINES[n % len(_LINES)], _DASHES[n // len(_LINES) % len(_DASHES)]
        for line in own:
            axis.plot(
                range(1, len(line) + 1), line, color=colour, linewidth=0.5, alpha=0.3, marker="." * (len(line) == 1)
            )
        longest = max(map(len, own))
        median = [np.median([line[i] for line in own if len(line) > i]) for i in range(longest)]
        axis.plot(
            range(1, longest + 1), median, dashes, color=colour, linewidth=2, marker="." * (longest == 1),
            label=f"{short(group, 24)} ({len(own)})",
        )  # fmt: skip


def _draw_in_order(figure: Figure, axis: Axes, lines: Mapping[str, Any]) -> None:
    """Draw thin lines whose colours go with the order of the layers, and a colour bar for it."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours, last = colormaps[_MAP], len(lines) - 1
    for n, line in enumerate(lines.values()):
        axis.plot(range(1, len(line) + 1), line, color=colours(n / last), linewidth=0.8, marker="." * (len(line) == 1))
    bar = figure.colorbar(ScalarMappable(Normalize(0, last), _MAP), ax=axis, ticks=[0, last])
    names = list(lines)
    bar.set_ticklabels([short(names[0], 28), short(names[-1], 28)])


def _number_cells(axis: Axes, value: Any, drawn: Any, cell: float) -> None:
    """Write the numbers into the cells of a map, with three or two digits, where the cells are wide enough for all."""
    for digits in (3, 2):
        texts = [["" if math.isnan(v) else number(v, digits) for v in row] for row in value.tolist()]
        if max(len(text) for row in texts for text in row) * 0.062 <= cell:
            break
    else:
        return
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            red, green, blue, _ = drawn.cmap(drawn.norm(value[y, x]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 and math.isfinite(value[y, x])
            axis.text(x, y, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")


def _positive(line: Any) -> Any:
    """Return the singular values that are not zero."""
    import numpy as np

    line = np.atleast_1d(line)
    largest = line.max(initial=0.0)
    return line[line > _ZERO * largest] if largest > 0 else line[:0]
