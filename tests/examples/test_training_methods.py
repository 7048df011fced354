"""examples/training_methods.py compares the methods in a few steps, each from the same beginning."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT

for _needed in ("sklearn", "matplotlib", "rich", "tqdm"):
    pytest.importorskip(_needed)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("training_methods")


@pytest.mark.slow
def test_every_method_is_trained_at_the_rate_with_the_least_loss(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = (1e-5, 1e-2)
    lengths = example.Lengths(pretrain_epochs=1, steps=2, every=2, seeds=1, rates=rates)
    results = example.run(tmp_path, lengths)

    for name in example.METHODS:
        assert tuple(results.losses[name]) == rates
        assert results.losses[name][results.rate(name)] == min(results.losses[name].values())
        assert [len(accuracies) for accuracies in results.accuracies[name]] == [2]
        assert len(results.step_times[name]) == (2 + 1) * 2
    begun = {tuple(seed[0] for seed in accuracies) for accuracies in results.accuracies.values()}
    assert len(begun) == 1  # B is zero at first
    at = {name: results.losses[name][1e-2] for name in example.METHODS}
    assert len(set(at.values())) == len(at)  # no two methods are the same

    lora = results.parameters["LoRA"]
    assert results.parameters["LoRA-FA"] * 2 == lora == results.parameters["LoRA+"]
    assert all(results.parameters[name] == lora for name in results.parameters if name.startswith("ResLoRA"))
    kept = {name: size / results.saved["LoRA"] for name, size in results.saved.items()}
    assert kept["LoRA-FA"] < 0.7 and kept["LoRA+"] == 1 and max(kept.values()) < 1.05
    assert {name: len(values) for name, values in results.as_lora.items()} == {
        "ResLoRA, input": 1,
        "ResLoRA, middle": 1,
    }

    told = capsys.readouterr().out
    assert all(name in told for name in example.METHODS)
    assert (tmp_path / "training_methods.png").read_bytes().startswith(b"\x89PNG")
