"""A bar of rich for work on many layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def over(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yield the items. On a terminal, a bar on stderr shows how many are done, if rich is installed."""
    if not sys.stderr.isatty():
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        yield from items
        return
    yield from track(items, what, console=Console(stderr=True), transient=True)
