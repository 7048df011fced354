"""The tables of a report, drawn by rich: a line for each module, and a line for each layer where they are few."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

from lora_kernels.analysis.findings import Findings, LayerReport
from lora_kernels.models.targets import some

_WIDTH = 160
"""Columns of a table as text."""
_GAP = 3
"""The columns of a terminal between two columns of a table."""
_FEW = 16
"""The most layers that are shown one by one without being asked for."""


class Column(NamedTuple):
    """A number of each layer."""

    title: str
    value: Callable[[LayerReport], Any]
    """The number; None where it is not known."""
    largest: bool = False
    """Whether a module shows the largest of its layers, and not the median with the range."""
    at_least: Callable[[LayerReport], bool] = lambda layer: False
    """Whether the number is a lower bound."""


_SPECTRUM = (
    Column("r", lambda layer: layer.r, True),
    Column("‖ΔW‖", lambda layer: layer.norm),
    Column("effective\nrank", lambda layer: layer.effective_rank),
    Column("stable\nrank", lambda layer: layer.stable_rank),
    Column("rank for\n90 %", lambda layer: layer.energy_rank_90, True),
    Column("suggested\nr", lambda layer: layer.energy_rank_99, True, lambda layer: 1 < layer.r == layer.energy_rank_99),
)
_OVER_W = (
    Column("‖ΔW‖\n/ ‖W‖", lambda layer: layer.relative_norm),
    Column("amplifi-\ncation", lambda layer: layer.amplification and layer.amplification.factor),
    Column("‖UᵀWV‖", lambda layer: layer.amplification and layer.amplification.projected),
    Column("W's own\ntop", lambda layer: layer.amplification and layer.amplification.projected_top),
    Column("random", lambda layer: layer.amplification and layer.amplification.projected_random),
    Column("φ of W\nand ΔW", lambda layer: layer.phi_weight),
    Column("random\nφ", lambda layer: None if layer.phi_weight is None else layer.rank / layer.shape[1]),
    Column("intruders", lambda layer: layer.intruders and layer.intruders.count, True),
)
_COMPARED = (
    Column("φ(1, 1)", lambda layer: layer.comparison and layer.comparison.first),
    Column("φ at both\nranks", lambda layer: layer.comparison and layer.comparison.at_rank),
    Column("random", lambda layer: layer.comparison and layer.comparison.random),
    Column("mean\nφ", lambda layer: layer.comparison and layer.comparison.mean),
    Column("random", lambda layer: layer.comparison and layer.comparison.mean_random),
    Column("cosine", lambda layer: layer.comparison and layer.comparison.cosine),
)


def as_text(report: Findings, every: bool | None = None) -> str:
    """Return the tables as text of at most 160 columns. Raises ImportError where rich is not installed."""
    out = io.StringIO()
    console = _rich("rich.console").Console(file=out, width=_WIDTH, color_system=None, highlight=False)
    for each in renderables(report, every, _WIDTH):
        console.print(each)
    lines = (line.rstrip() for line in out.getvalue().splitlines())
    return "\n".join(lines).strip("\n")


def renderables(report: Findings, every: bool | None, width: int) -> Iterator[Any]:
    """Yield what rich prints: the tables and the notes. A table that is wider than `width` is divided into several.
    Raises ImportError where rich is not installed."""
    text = _rich("rich.text").Text  # names may look like rich's markup
    modules: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        modules.setdefault(layer.module, []).append(layer)
    tables = (
        (f"{report.adapter}: {_count(report.layers)}", _SPECTRUM),
        (f"Beside W, of {report.base}", _OVER_W),
        (f"Beside {report.other}", _COMPARED),
    )
    each = len(report.layers) <= _FEW if every is None else every
    for title, columns in tables:
        known = [c for c in columns if any(c.value(layer) is not None for layer in report.layers)]
        if not known:
            continue
        yield text(title, style="bold")
        if not each or (every and len(modules) < len(report.layers)):
            yield from _tables("module", known, list(modules.items()), width)
        if each:
            yield from _tables("layer", known, [(layer.name, [layer]) for layer in report.layers], width)
    for note in _notes(report):
        yield text(note)
    if not each:
        yield text(
            "Of each module: the median of its layers and their range, and the largest of r and of the ranks. "
            "--layers, or report.table(every=True), shows each layer."
        )


def _tables(
    first: str, columns: Sequence[Column], lines: Sequence[tuple[str, Sequence[LayerReport]]], width: int
) -> Iterator[Any]:
    """Yield tables of some of the columns each, as many as have room beside the names."""
    names = 2 + max(len(first), *(len(some([name])) for name, _ in lines))  # with a blank at each edge
    if first == "module":
        names += _GAP + len("layers")
    part: list[Column] = []
    used = names
    for column in columns:
        texts = [column.title, *(_cell(column, layers) for _, layers in lines)]
        own = _GAP + max(len(line) for text in texts for line in text.split("\n"))
        if part and used + own > width:
            yield _table(first, part, lines)
            part, used = [], names
        part.append(column)
        used += own
    yield _table(first, part, lines)


def _table(first: str, columns: Sequence[Column], lines: Iterable[tuple[str, Sequence[LayerReport]]]) -> Any:
    text = _rich("rich.text").Text
    table = _rich("rich.table").Table(box=_rich("rich.box").SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    if first == "module":
        table.add_column("layers", justify="right")
    for column in columns:
        table.add_column(column.title, justify="right", overflow="fold")
    for name, layers in lines:
        count = [str(len(layers))] if first == "module" else []
        table.add_row(text(some([name])), *count, *(_cell(column, layers) for column in columns))
    return table


def _cell(column: Column, layers: Sequence[LayerReport]) -> str:
    """Return one number, the largest of several, or their median above their range."""
    numbers = [value for layer in layers if (value := column.value(layer)) is not None and not math.isnan(value)]
    if not numbers:
        return "–"
    if column.largest or len(numbers) == 1:
        bound = any(column.at_least(layer) for layer in layers if column.value(layer) == max(numbers))
        return f"{'≥ ' * bound}{_number(max(numbers))}"
    low, middle, high = (_number(each) for each in (min(numbers), median(numbers), max(numbers)))
    return middle if low == high else f"{middle}\n{low} – {high}"


def _notes(report: Findings) -> Iterator[str]:
    yield from (f"Note: {note}." for note in report.notes)
    reasons: dict[str, list[str]] = {}
    for name, reason in report.without_weight:
        reasons.setdefault(reason, []).append(name)
    yield from (f"Without W: {some(names)}: {reason}." for reason, names in reasons.items())
    if report.only_here:
        yield f"Only in {report.adapter}: {some(report.only_here)}."
    if report.only_there:
        yield f"Only in {report.other}: {some(report.only_there)}."


def _count(layers: Sequence[LayerReport]) -> str:
    return f"{len(layers)} update" + "s" * (len(layers) != 1)


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞"
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.2f}" if 1 <= abs(value) < 100 else f"{value:.3g}"


def _rich(module: str) -> Any:
    """Return a module of rich. Raises ImportError, which says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("the table of a report needs rich: pip install rich. report.layers has the data") from error
