"""A call of a fused layer enters few Python frames, and benchmarks/frames.py counts them correctly."""

from __future__ import annotations

import json

import pytest

from benchmarks import frames
from lora_kernels.core import dropout

LIMITS = {
    "LoRA forward": 18,
    "LoRA forward + backward": 28,
    "LoRA without gradients": 15,
    "nf4 forward": 23,
    "DoRA forward": 33,
    "PEFT, fused, forward": 22,
}
"""The most frames of the package that a call may enter on Python 3.10 and 3.11. Later versions inline comprehensions
and enter fewer. A call that needs more has gained a helper, a property or a comprehension."""


@pytest.mark.parametrize("call", frames.CALLS)
def test_a_call_enters_no_more_frames_than_its_limit(call):
    pytest.importorskip("lora_kernels.backends.cpu", reason="the native CPU kernels are not built")
    if call.startswith("PEFT"):
        pytest.importorskip("peft", reason="PEFT is not installed")
    found = frames.measure(call)
    assert found.own <= LIMITS[call]
    assert found.own < found.total and 0 < found.files <= found.own


def test_only_frames_of_the_package_are_own():
    assert frames.count(lambda: json.dumps({})).own == 0
    # rescale calls threshold, which is in the same file
    assert frames.count(lambda: dropout.rescale(0.1)) == (2, 2, 1, 0)


def test_the_table_has_a_row_for_each_call_and_json_its_numbers(capsys, monkeypatch):
    monkeypatch.setattr(frames, "CALLS", {"rescale": lambda: lambda: dropout.rescale(0.1)})
    assert frames.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rescale": {"own": 2, "total": 2, "files": 1, "moves": 0}}
    assert frames.main([]) == 0
    assert "rescale" in capsys.readouterr().out
    assert frames.main(["--trace", "rescale"]) == 0
    assert "threshold" in capsys.readouterr().out
