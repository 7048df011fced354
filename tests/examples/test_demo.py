"""The demo runs from start to end in a few epochs, and its promises hold."""

from __future__ import annotations

import importlib
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.paths import ROOT

for _needed in ("sklearn", "matplotlib", "rich", "tqdm"):
    pytest.importorskip(_needed)


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("digits")


def test_the_demo_keeps_its_promises(digits: ModuleType, tmp_path: Path) -> None:
    results = digits.run(tmp_path, digits.Lengths(pretrain_epochs=2, adapt_epochs=2, timed_rounds=2))

    assert len(results.checks) == 4
    assert [what for what, (held, _) in results.checks.items() if not held] == []
    accuracy = results.accuracy
    assert accuracy["adapter off (scaling 0)"] == accuracy["pretrained"]
    assert accuracy["adapter merged"] == accuracy["adapter loaded from its file"] == accuracy["with the adapter"]
    assert accuracy["pretrained"][0] > 0.6  # upright
    assert accuracy["with the adapter"][1] > accuracy["pretrained"][1] + 0.2  # rotated

    files = {path.stem: path for path in tmp_path.iterdir()}
    assert results.sizes["adapter"][1] == files["adapter"].stat().st_size < results.sizes["model"][1] / 4
    names = digits.load(files["adapter"])
    assert len(names) == 2 * len(digits.TARGETS) * 3
    assert all(name.endswith(("lora_A", "lora_B")) for name in names)

    assert {len(times) for times in results.step_times.values()} == {2}
    png = (tmp_path / "digits.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (1350, 960)


def test_the_demo_runs_without_peft(
    digits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    models = digits.contenders(digits.ViT())
    assert list(models) == ["frozen, no adapter: the floor", "lora_kernels"]
    assert "PEFT is not installed" in capsys.readouterr().out


def test_the_floor_passes_the_gradients_that_lora_needs(digits: ModuleType) -> None:
    """The step of the frozen model is a floor only if dx passes the same linears as with LoRA."""
    models = digits.contenders(digits.ViT())
    reached = {}
    for name in ("frozen, no adapter: the floor", "lora_kernels"):
        linears = [getattr(block, target) for block in models[name].blocks for target in digits.TARGETS]
        wants: list[tuple[bool, bool]] = []
        for linear in linears:
            linear.register_forward_hook(
                lambda _, x, y, wants=wants: wants.append((x[0].requires_grad, y.requires_grad))
            )
        models[name](torch.randn(2, 8, 8))
        reached[name] = wants
    floor, lora = reached.values()
    assert floor == lora
    assert lora.count((True, True)) == len(lora) - 3  # dx enters all but q, k and v of the first block


def test_files_need_no_safetensors(digits: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    tensors = {"lora_A": torch.randn(2, 3)}
    path = digits.save(tensors, tmp_path / "adapter")
    assert path.suffix == ".pt"
    assert torch.equal(digits.load(path)["lora_A"], tensors["lora_A"])
