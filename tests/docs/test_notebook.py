"""The notebook has the cells of its source and the outputs of a run, and its code runs."""

from __future__ import annotations

import importlib
import json
import re
from types import ModuleType
from typing import Any

import pytest
from support.paths import ROOT

NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("notebook")


def outputs() -> list[dict[str, Any]]:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [each for cell in book["cells"] if cell["cell_type"] == "code" for each in cell["outputs"]]


def test_the_notebook_has_the_cells_of_its_source(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0, "run python scripts/notebook.py"
    assert {cell.kind for cell in script.stored(NOTEBOOK)} == {"markdown", "code"}


def test_a_changed_cell_is_noticed(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    changed = tmp_path / "cells.py"
    changed.write_text(script.SOURCE.read_text(encoding="utf-8").replace("r=8", "r=9"), encoding="utf-8")
    monkeypatch.setattr(script, "SOURCE", changed)
    assert script.main(["--check"]) == 1


def test_the_notebook_keeps_a_picture_and_a_table_and_no_errors_or_paths() -> None:
    found = outputs()
    assert any("image/png" in each.get("data", {}) for each in found)
    text = "".join("".join(each.get("text", "")) for each in found)
    assert "frozen layer" in text and "PEFT, fused" in text
    assert not any(each["output_type"] == "error" or each.get("name") == "stderr" for each in found)
    assert not re.search(r"(/home|/tmp|/root|/work|site-packages)", text)
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
def test_the_code_of_the_notebook_runs(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("peft", "matplotlib", "sklearn"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import matplotlib

    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for cell in script.cells(script.SOURCE.read_text(encoding="utf-8")):
        if cell.kind == "code":
            exec(compile(cell.source, "notebook", "exec"), namespace)
    assert namespace["after"] > namespace["before"] + 0.3
