"""The benchmark of `analyse` reports times only of numbers that are right."""

from __future__ import annotations

import json

import pytest

from benchmarks import analysis

pytest.importorskip("rich")
ARGUMENTS = ["--layers", "3", "--size", "48", "--rank", "4"]


def test_it_measures_and_writes(tmp_path, capsys):
    assert analysis.main([*ARGUMENTS, "--out", str(tmp_path / "out.json")]) == 0
    assert "3 layers of 48×48, r 4" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "out.json").read_text())["seconds"]) >= set(analysis.TARGETS)


def test_a_wrong_number_is_no_time(monkeypatch, capsys):
    adapter_of = analysis.adapter_of
    monkeypatch.setattr(analysis, "adapter_of", lambda names, size, values: adapter_of(names, size, values * 1.001))
    assert analysis.main(ARGUMENTS) == 1
    assert "✗ without W: model.layers.0.k_proj: a singular value is off by 1.0e-03" in capsys.readouterr().out
