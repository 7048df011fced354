"""scripts/update_readme.py as a module, and a checkout whose pages it writes."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.paths import ROOT

from lora_kernels.testing.documents import write


def load_script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module("update_readme")


def checkout(folder: Path) -> Path:
    """A checkout without results, whose pages have old text between their markers."""
    script = load_script()
    for name, blocks in script.PAGES.items():
        page = folder / name
        page.parent.mkdir(parents=True, exist_ok=True)
        marked = "".join(f"{script.begin(marker)}\nold\n{script.end(marker)}\n" for marker in blocks)
        page.write_text(f"# before\n{marked}after\n")
    return folder


def put(root: Path, name: str, document: dict[str, Any], png: bool = False) -> Path:
    """Write a document among the results of a checkout, and an empty picture beside it if asked for."""
    path = root / "benchmarks" / "results" / name
    write(document, path)
    if png:
        path.with_suffix(".png").touch()
    return path


def page_of_measurements(root: Path) -> str:
    """Run the script on a checkout. Return its docs/measuring.md."""
    assert load_script().main(["--root", str(root)]) == 0
    return (root / "docs" / "measuring.md").read_text()
