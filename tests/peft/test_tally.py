"""A process of a run tells the layers that PEFT has made in it, and the calls of those that are gone too."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="PEFT is not installed")
from peft.tuners.lora import LoraLayer
from support.peft_models import make

import lora_kernels
from lora_kernels.peft import tally
from lora_kernels.peft.layer import FusedLayer


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tally, "_tally", None)
    ends = []
    monkeypatch.setattr(tally.util, "Finalize", lambda _, end, exitpriority: ends.append(end))
    yield
    assert len(ends) == 1
    del FusedLayer.__del__


def told(folder: Path) -> dict:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


def noted(folder: Path):
    model = make()
    lora_kernels.fuse(model)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            tally.note(layer, str(folder))
    return model


def test_calls_are_counted_once_whether_the_layers_live_or_not(noting, tmp_path):
    gone, kept, x = noted(tmp_path), noted(tmp_path), torch.randn(3, 24)
    assert told(tmp_path) == {"made": 1, "fused_calls": 0, "not_fused": {}, "passed_over": {}, "ended": False}
    for _ in range(3):
        gone(x)
    kept(x)
    weak = weakref.ref(next(each for each in gone.modules() if isinstance(each, FusedLayer)))
    copied = copy.deepcopy(gone)  # a copy begins with the numbers of its original, and was not made by PEFT
    gone.base_model.model.up.cycle = gone
    del gone, copied
    gc.collect()
    assert weak() is None
    tally._tally.end()
    assert told(tmp_path) == {"made": 4, "fused_calls": 8, "not_fused": {}, "passed_over": {}, "ended": True}
    tally._tally.end()
    assert told(tmp_path)["fused_calls"] == 8


def test_layers_and_calls_that_are_left_to_peft_are_told_with_the_reason(noting, tmp_path):
    model = noted(tmp_path)
    layer = torch.nn.Linear(2, 2)
    tally.note(layer, str(tmp_path))
    lora_kernels.unfuse(plain := make())
    tally.note(plain.base_model.model.up, str(tmp_path))
    model(torch.randn(3, 24))
    model.base_model.model.up.passed_over["a reason"] += 2
    lora_kernels.unfuse(model.base_model.model.down)
    tally._tally.end()
    assert told(tmp_path) == {
        "made": 4,
        "fused_calls": 1,
        "not_fused": {"a torch.nn.modules.linear.Linear, not a plain linear": 1, "disable() was called": 1},
        "passed_over": {"a reason": 2},
        "ended": True,
    }


def test_a_forked_process_makes_a_tally_of_its_own(noting, tmp_path, monkeypatch):
    noted(tmp_path)
    first = tally._tally
    monkeypatch.setattr(tally.util, "Finalize", lambda *args, **kwargs: None)
    monkeypatch.setattr(tally.os, "getpid", lambda: first.pid + 1)
    model = noted(tmp_path)
    assert tally._tally is not first and tally._tally.made == 2
    assert sorted(int(file.stem) for file in tmp_path.glob("*.json")) == [first.pid, first.pid + 1]
    del model


def test_a_run_that_has_ended_before_is_not_told(noting, tmp_path):
    model = noted(tmp_path / "gone")
    tally._tally.end()
    assert not list(tmp_path.iterdir())
    del model
