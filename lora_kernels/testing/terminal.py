"""Tables and a progress bar on the terminal: drawn by rich if it is installed, plain text otherwise."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_WIDTH = 144
"""Columns of the output if it does not go to a terminal."""


class Terminal:
    """Plain text on standard output, and progress as single lines on standard error."""

    def line(self, text: str = "") -> None:
        """Print a line of text."""
        print(text, flush=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> None:
        """Print a table. The first column is aligned left, the others right, or left too if they hold `words`."""
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        self.line(f"\n{title}")
        for row in (header, ["-" * width for width in widths], *rows):
            cells = [cell.ljust(width) if words else cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            self.line("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str, int], None]]:
        """Yield ``advance(what, steps)``: it shows what runs now, and that `steps` more of `total` are done."""
        done, last = 0, ""

        def advance(what: str, steps: int) -> None:
            nonlocal done, last
            done += steps
            if what != last:
                print(f"[{100 * done // total:3d}%] {what}", file=sys.stderr, flush=True)
                last = what

        yield advance


class RichTerminal(Terminal):
    """The same output, drawn by rich."""

    _COLOURS = (
        (r"\b(met|ready|green|built)\b|✓", "green"),
        (r"\b(missed|red|not ready|not built)\b|✗", "bold red"),
        (r"×\d\S*", "cyan"),
        (r"±\S+", "dim"),
    )

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        if not self._console.is_terminal:
            self._console.width = _WIDTH

    def line(self, text: str = "") -> None:
        """Print a line of text, with numbers and verdicts in colour."""
        self._console.print(self._coloured(text))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> None:
        """Print the table with rules and colours."""
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD, title=f"[bold]{title}[/bold]", title_justify="left", title_style="", pad_edge=False
        )
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i and not words else "left", overflow="fold", no_wrap=not i)
        for row in rows:
            table.add_row(*map(self._coloured, row))
        self._console.print(table)

    def _coloured(self, text: str) -> Any:
        from rich.text import Text

        result = Text(text)
        for pattern, style in self._COLOURS:
            result.highlight_regex(pattern, style)
        return result

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str, int], None]]:
        """Yield ``advance(what, steps)``, which draws a bar if there is a terminal to draw it on."""
        if not self._console.is_terminal:
            with super().progress(total) as advance:
                yield advance
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        # The bar is drawn between rounds only: a thread that redraws would take time from what is measured.
        with Progress(*columns, console=self._console, transient=True, auto_refresh=False) as progress:
            task = progress.add_task("", total=total)

            def advance(what: str, steps: int) -> None:
                progress.update(task, advance=steps, description=what, refresh=True)

            yield advance


def terminal() -> Terminal:
    """Return the best terminal that is installed and works."""
    try:
        return RichTerminal() if importlib.util.find_spec("rich") else Terminal()
    except Exception:  # a rich that is there and broken
        return Terminal()
