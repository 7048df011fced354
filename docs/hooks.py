"""Give the site its own copies of files of the repository that a page links to, such as measured results and charts.

A page in docs/ links to them by a relative path (``../benchmarks/results/x.json``), which works in a checkout. In the
site the copy lies under ``repository/``. Markdown is copied as text, so that it does not become a page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add a copy of every file outside docs/ that a page links to."""
    root = Path(config.config_file_path).parent
    for page in list(files.documentation_pages()):
        for link in LINK.finditer(Path(page.abs_src_path).read_text(encoding="utf-8")):
            path = _outside(page.src_uri, link[1])
            if path and (root / path).is_file() and files.get_file_from_path(_copy(path)) is None:
                files.append(File.generated(config, _copy(path), abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return the page with its links to files outside docs/ pointed at the copies."""

    def repoint(link: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, link[1])
        if not path or files.get_file_from_path(_copy(path)) is None:
            return link[0]
        return f"]({posixpath.relpath(_copy(path), posixpath.dirname(page.file.src_uri) or '.')})"

    return LINK.sub(repoint, markdown)


def _outside(page: str, link: str) -> str | None:
    """Return the path, from the root of the repository, that `link` on `page` names, or None if it is inside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def _copy(path: str) -> str:
    """Return the place of the site's copy of `path`."""
    return f"repository/{path}.txt" if path.endswith(".md") else f"repository/{path}"
