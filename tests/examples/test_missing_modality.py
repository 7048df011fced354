"""examples/missing_modality.py trains with and without adapter dropout, and its promise about bits can fail."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.paths import ROOT

for _needed in ("sklearn", "matplotlib", "rich", "tqdm", "peft"):
    pytest.importorskip(_needed)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("missing_modality")


@pytest.mark.slow
def test_samples_without_their_second_stream_keep_the_pretrained_model(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "PS", (0.0, 0.5))
    results = example.run(tmp_path, example.Lengths(pretrain_steps=10, steps=8, seeds=1))

    assert set(results.checks) == set(example.CHECKS.values()) and all(results.checks.values())
    ways = [(trained, p) for trained in (example.ALONE, example.BOTH) for p in example.PS]
    assert list(results.left_on) == ways
    assert {key: len(values) for key, values in results.accuracy.items()} == {
        (*way, share): 1 for way in ways for share in example.SHARES
    }
    assert all(results.accuracy[example.ALONE, p, 0.0] == [results.base] for p in example.PS)
    told = capsys.readouterr().out
    assert told.count("yes") == 2 and "NO" not in told
    assert (tmp_path / "missing-modality.png").read_bytes().startswith(b"\x89PNG")

    # Adapters that stay on for a missing stream fail the check.
    pretrained = example.ViT().requires_grad_(False)
    model = example.with_adapters(pretrained, ["rest"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    _, test = example.load_data()
    for switched_off in (True, False):
        if not switched_off:
            monkeypatch.setattr(example, "BASE", example.REST)
        found = example.Results()
        example.measure(model, pretrained, example.ALONE, 0.3, 0, test, found)
        assert found.checks == {example.CHECKS[example.ALONE]: switched_off}
