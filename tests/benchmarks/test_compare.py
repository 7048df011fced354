"""`benchmarks.compare` times two checkouts, here this one and itself."""

from __future__ import annotations

import json

import pytest
from support.paths import ROOT

from benchmarks import compare


def test_a_row_is_timed_in_as_many_pairs_of_processes_as_asked_for(tmp_path, capsys, monkeypatch):
    made, start = [], compare.Timer.__init__
    monkeypatch.setattr(compare.Timer, "__init__", lambda self, *rest: made.append(1) or start(self, *rest))
    file = tmp_path / "figures.json"
    row = "FusedLoRALinear 128x128 fp32 M=1 forward"
    arguments = [str(ROOT), str(ROOT), "--pairs", "2", "--rounds", "2", "--rows", row, "--json", str(file)]
    assert compare.main(arguments) == 0
    figures = json.loads(file.read_text())
    assert list(figures) == [row] and len(made) == 4
    found = figures[row]
    assert 0 < found["ratio_lowest"] <= found["ratio"] <= found["ratio_highest"]
    assert found["old_s"] > 0 and found["new_s"] > 0 and row in capsys.readouterr().out


def test_a_name_that_no_row_has_is_refused_with_all_names():
    with pytest.raises(SystemExit, match="no row has 'gpt3' in its name: vit fp32"):
        compare.main([str(ROOT), str(ROOT), "--rows", "gpt3"])


def test_a_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no folder lora_kernels"):
        compare.main([str(tmp_path), str(ROOT), "--rows", "vit"])


def test_a_checkout_that_was_not_built_is_refused(tmp_path):
    """Its layers would run on another back-end."""
    (tmp_path / "lora_kernels" / "_C.pyi").parent.mkdir()
    (tmp_path / "lora_kernels" / "_C.pyi").touch()
    with pytest.raises(SystemExit, match=r"has no native code: run `python setup\.py build_ext --inplace`"):
        compare.main([str(ROOT), str(tmp_path), "--rows", "vit"])
