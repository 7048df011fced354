"""`benchmarks.compare` times two checkouts, here this one and itself."""

from __future__ import annotations

import json

import pytest
from support.paths import ROOT

from benchmarks import compare


def test_every_row_is_timed_in_several_pairs_of_processes(tmp_path, capsys):
    file = tmp_path / "figures.json"
    row = "FusedLoRALinear 128x128 fp32 M=1 forward"
    arguments = [str(ROOT), str(ROOT), "--pairs", "2", "--rounds", "2", "--rows", row, "--json", str(file)]
    assert compare.main(arguments) == 0
    figures = json.loads(file.read_text())
    assert list(figures) == [row]
    found = figures[row]
    assert 0 < found["ratio_lowest"] <= found["ratio"] <= found["ratio_highest"]
    assert found["old_s"] > 0 and found["new_s"] > 0 and row in capsys.readouterr().out


def test_a_name_that_no_row_has_is_refused_with_all_names():
    with pytest.raises(SystemExit, match="no row has 'gpt3' in its name: vit fp32"):
        compare.main([str(ROOT), str(ROOT), "--rows", "gpt3"])


def test_a_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no folder lora_kernels"):
        compare.main([str(tmp_path), str(ROOT), "--rows", "vit"])
