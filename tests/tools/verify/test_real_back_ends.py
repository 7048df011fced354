"""The classes of the Triton back-ends, judged as ``verify`` judges them, with the kernels in the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.fake_gpu import CPU, IDENTITY
from support.told import told

pytest.importorskip("lora_kernels.backends.triton", exc_type=ImportError)
from support.interp import interpret

from lora_kernels.backends import dispatch
from lora_kernels.backends.triton import device
from lora_kernels.evidence import find, identity
from lora_kernels.plans.tiles import Gpu
from lora_kernels.tools.verify import cases, experts, judge_class, many
from lora_kernels.tools.verify.subject import Setting, Size

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plan_cache")]

BF16 = torch.bfloat16
SMALL = ((Size(40, 72, 48, 8), 0.1), (Size(40, 72, 48, 8), 0.0), (Size(5, 72, 48, 8), 0.0))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An interpreted GPU that `triton` and `composite` serve, and cases that the interpreter can afford."""
    target = device.Target(Gpu("sm_80", 2), contextlib.nullcontext, lambda: 0, lambda: False)
    monkeypatch.setitem(device.TARGETS, CPU, target)
    monkeypatch.setattr(identity, "identify", lambda device: IDENTITY)
    monkeypatch.setitem(dispatch.AUTOMATIC, "cpu", ("triton", "composite", "eager"))
    monkeypatch.setattr(cases, "CASES", SMALL)
    monkeypatch.setattr(many, "CASES", ((Size(40, 72, 48, 20), 0.1), (Size(40, 72, 48, 20), 0.0)))
    find.forget()
    with interpret():
        yield


@pytest.mark.parametrize(
    "setting", [Setting(BF16, torch.float32, 0.0), Setting(BF16, BF16, 0.0, "nf4")], ids=["fp32 adapters", "nf4"]
)
def test_every_class_is_right(setting: Setting, served, tmp_path: Path) -> None:
    classes = cases.kernel_classes(CPU, [setting], [], most=1)
    verdicts = [
        event["verdict"]
        for each in classes
        for event in told(tmp_path, lambda tell, each=each: judge_class.main(CPU, each, tell))
        if "verdict" in event
    ]
    assert [verdict for verdict in verdicts if verdict["result"] != "right"] == []
    ours = () if setting.quant else experts.PASSES  # the weights of experts are dense
    keys = [verdict["key"].split() for verdict in verdicts]
    assert {name for name, *_ in keys} == {"composite", "triton"}
    assert {op for name, op, *_ in keys if name == "composite"} == {*cases.PASSES, *many.PASSES, *ours}
