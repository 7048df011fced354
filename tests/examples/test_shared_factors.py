"""The example of VeRA and Tied-LoRA adapts a classifier in a few steps, and its promises hold."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT

for _needed in ("sklearn", "matplotlib", "rich", "tqdm", "peft", "safetensors"):
    pytest.importorskip(_needed)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("shared_factors")


@pytest.mark.slow
def test_few_parameters_adapt_a_classifier(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = example.run(tmp_path, example.Lengths(pretrain_epochs=2, adapt_epochs=1, timed_rounds=2))

    assert [what for what, (held, _) in results.checks.items() if not held] == [] and len(results.checks) == 2
    assert results.accuracy[example.LORA][1] > results.accuracy["pretrained"][1] + 0.1  # rotated
    assert results.parameters[example.VERA] < results.parameters[example.TIED] < results.parameters[example.LORA]
    assert results.files[example.VERA] < results.files[example.LORA]

    told = capsys.readouterr().out
    assert all(name in told for name in example.WAYS)
    assert (tmp_path / "shared-factors.png").read_bytes().startswith(b"\x89PNG")
