"""Rows of words as plain text, and as a table of rich."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_kernels.models.targets import some

if TYPE_CHECKING:
    from rich.table import Table

Rows = Sequence[Sequence[str]]
"""The header, and then the rows. Numbers stand at the right of every column but the first and those without a title."""


def as_text(rows: Rows) -> str:
    """Return the rows as lines with aligned columns."""
    rows = [[_shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [bool(i and title) for i, title in enumerate(rows[0])]
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    )


def as_table(rows: Rows, title: str = "", notes: Sequence[str] = ()) -> Table:
    """Return a table of rich with notes below it. Raises ImportError where rich is not installed."""
    try:
        table_of, text = importlib.import_module("rich.table").Table, importlib.import_module("rich.text").Text
    except ImportError as error:
        raise ImportError("a table in colours needs rich: pip install rich, or print the object itself") from error
    header, *lines = rows
    below: dict[str, Any] = {"caption": text("\n".join(notes)), "caption_justify": "left"} if notes else {}
    table: Table = table_of(title=title or None, title_justify="left", **below)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i and name else "left")
    for line in lines:
        table.add_row(*(text(_shown(cell)) for cell in line))  # a name may look like rich's markup
    return table


def _shown(cell: str) -> str:
    """Return a cell without letters that a terminal would obey, since names may be those of a hostile file."""
    return some([cell]) if cell else cell
