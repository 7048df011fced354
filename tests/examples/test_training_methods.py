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
def test_every_method_is_compared_at_the_rate_with_the_least_loss(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = (1e-3, 1e-2)
    lengths = example.Lengths(pretrain_epochs=1, steps=2, every=2, seeds=1, rates=rates)
    results = example.run(tmp_path, lengths)

    for name, by_rate in results.runs.items():
        assert tuple(by_rate) == rates and all(len(runs) == 1 for runs in by_rate.values())
        losses = {rate: runs[0].held_out for rate, runs in by_rate.items()}
        assert losses[results.rate(name)] == min(losses.values())
        assert len(results.best(name)[0].accuracies) == 1
        assert (results.best(name)[0].as_lora is not None) == (name in ("ResLoRA, input", "ResLoRA, middle"))
        assert len(results.step_times[name]) == 2 * 2
    at = {by_rate[1e-2][0].held_out for by_rate in results.runs.values()}
    assert len(at) == len(results.runs) == len(example.METHODS)  # no two methods are the same

    lora = results.parameters["LoRA"]
    assert results.parameters["LoRA-FA"] * 2 == lora == results.parameters["LoRA+"]
    assert all(results.parameters[name] == lora for name in results.parameters if name.startswith("ResLoRA"))
    kept = {name: size / results.saved["LoRA"] for name, size in results.saved.items()}
    assert kept["LoRA-FA"] < 0.7 and kept["LoRA+"] == 1 and max(kept.values()) < 1.05

    told = capsys.readouterr().out
    assert all(name in told for name in example.METHODS)
    assert (tmp_path / "training_methods.png").read_bytes().startswith(b"\x89PNG")
