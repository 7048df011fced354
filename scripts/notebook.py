"""Make examples/first_steps.ipynb from the cells in scripts/notebook_cells.py, run it, and keep its outputs.

    pip install nbformat nbclient ipykernel
    python scripts/notebook.py            # about half a minute; writes the notebook
    python scripts/notebook.py --check    # changes nothing: exit status 1 if the notebook has other cells

The cells are plain Text and Python in one file, so that a change of the notebook can be read. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "scripts" / "notebook_cells.py"
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"
_MARK = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)
_TIMEOUT = 300
"""Seconds that a cell may take."""


class Cell(NamedTuple):
    """A cell of the notebook."""

    kind: str
    """ "markdown" or "code"."""
    source: str


def cells(text: str) -> list[Cell]:
    """Return the cells of a file in which ``# %%`` begins a cell of code and ``# %% [markdown]`` one of text, each line
    of which begins with ``# ``."""
    parts = _MARK.split(text)[1:]
    found = []
    for mark, source in zip(parts[::2], parts[1::2], strict=True):
        if mark:
            source = "\n".join(line.removeprefix("#").removeprefix(" ") for line in source.splitlines())
        found.append(Cell("markdown" if mark else "code", source.strip()))
    return found


def made(parts: list[Cell]) -> Any:
    """Return a notebook of these cells, without outputs. The ids of its cells are their numbers, so that a run changes
    no more than it must."""
    import nbformat

    book = nbformat.v4.new_notebook()
    for number, part in enumerate(parts):
        new = nbformat.v4.new_markdown_cell if part.kind == "markdown" else nbformat.v4.new_code_cell
        book.cells.append(new(part.source, id=f"cell-{number}"))
    return book


def executed(book: Any) -> Any:
    """Return the notebook with the outputs of a run in this Python. Raises what nbclient raises on an error in a
    cell."""
    from nbclient import NotebookClient

    NotebookClient(book, timeout=_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # the times of a run are no part of the result
        if cell.cell_type == "code":  # nor are warnings of the packages that happen to be installed
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return book


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if the cells differ")
    args = parser.parse_args(argv)
    wanted = cells(SOURCE.read_text(encoding="utf-8"))
    if args.check:
        return int(wanted != stored(NOTEBOOK))
    absent = [name for name in ("nbformat", "nbclient", "ipykernel") if importlib.util.find_spec(name) is None]
    if absent:
        print(f"pip install {' '.join(absent)}")
        return 1
    import nbformat

    from lora_kernels.core import atomic

    book = executed(made(wanted))
    nbformat.validate(book)
    atomic.replace({NOTEBOOK: (nbformat.writes(book) + "\n").encode()})
    print(f"wrote {NOTEBOOK.relative_to(ROOT)}")
    return 0


def stored(path: Path) -> list[Cell]:
    """Return the cells of a notebook file."""
    import json

    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [Cell(cell["cell_type"], "".join(cell["source"])) for cell in found]


if __name__ == "__main__":
    sys.exit(main())
