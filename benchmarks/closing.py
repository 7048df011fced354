"""The parts that benchmarks share: a check of what is installed, and the end, with notes, faults that the judge found,
the JSON, and the exit status."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_kernels.testing.documents import write
from lora_kernels.testing.terminal import Terminal

Entry = dict[str, Any]


def _name(entry: Entry) -> str:
    return str(entry["name"])


def lacks(show: Terminal, *packages: str) -> bool:
    """Return whether a package that generation needs is not installed, and say so."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        show.line(f"Nothing to generate with: pip install {' '.join(absent)}")
    return bool(absent)


def close(document: Entry, out: Path | None, show: Terminal, name: Callable[[Entry], str] = _name) -> int:
    """Show the notes and faults of a document and write it to `out` if that is given. Return the exit status: 1 if the
    judge found a fault, else 0. `name` names the variant of an entry under "gate"."""
    for note in document["notes"]:
        show.line(note)
    faults = [f"{name(entry)}: {fault}" for entry in document["gate"] for fault in entry["faults"]]
    for fault in faults:
        show.line(f"✗ {fault}")
    if not faults:
        show.line(f"✓ the judge found no fault in {len(document['gate'])} checks")
    if out:
        write(document, out)
        show.line(f"Written: {out}")
    return int(bool(faults))
