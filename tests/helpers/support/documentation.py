"""The pages of the documentation, README among them, and the code blocks in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\n$")
_FIRST = re.compile(r"<!-- run first: (.+?) -->\n$")


class Block(NamedTuple):
    """A fenced code block."""

    language: str
    code: str
    line: int
    """The number of its first line of code in the page."""
    not_run: str | None
    """Why it is not run, from the comment in front of it."""
    first: str
    """A line of code to run before it, from the comment in front of it; usually empty."""


def name_of(page: Path) -> str:
    """Return the path of a page from the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """Yield every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        not_run, first = _NOT_RUN.search(before), _FIRST.search(before)
        line = before.count("\n") + 2
        yield Block(fence[1], fence[2], line, not_run[1] if not_run else None, first[1] if first else "")
