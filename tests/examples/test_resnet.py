"""The ResNet of examples/resnet.py adapts in a few steps, and its promises hold."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT

for _needed in ("sklearn", "matplotlib", "rich", "tqdm", "peft"):
    pytest.importorskip(_needed)


@pytest.fixture
def resnet(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("resnet")


@pytest.mark.slow
def test_a_resnet_adapts_and_keeps_as_little_as_full_training(
    resnet: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = resnet.run(tmp_path, resnet.Lengths(pretrain_epochs=2, adapt_epochs=1, timed_rounds=2))

    assert [what for what, (held, _) in results.checks.items() if not held] == [] and len(results.checks) == 2
    assert results.accuracy["pretrained"][0] > 0.6  # upright
    assert results.accuracy[resnet.OURS][1] > results.accuracy["pretrained"][1] + 0.2  # rotated
    assert results.parameters[resnet.OURS] == results.parameters[resnet.PEFT] < results.parameters[resnet.FULL] / 5
    assert results.saved[resnet.OURS] <= 1.1 * results.saved[resnet.FULL] < results.saved[resnet.PEFT]

    told = capsys.readouterr().out
    assert all(name in told for name in (resnet.OURS, resnet.PEFT, resnet.FULL, "kernel 3×3"))
    assert (tmp_path / "resnet.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "resnet-adapter" / "adapter_model.safetensors").exists()
