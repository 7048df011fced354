"""The rows of folded kinds in the bench: every way computes the function of its cell."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from lora_kernels.bench.kinds import folded
from lora_kernels.bench.kinds.cells import FROZEN, OURS, PEFT
from lora_kernels.bench.kinds.measure import saved_bytes


@pytest.mark.parametrize("kind", folded._NAMES)
def test_every_way_is_right_at_a_small_size(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folded, "_N", 32)
    monkeypatch.setattr(folded, "_M", 9)
    cell = folded._cell(kind)
    try:
        ways = cell.ways()
    except AttributeError as error:
        pytest.skip(f"this PEFT has no such kind: {error}")
    assert list(ways) == [FROZEN, folded.PLAIN, PEFT, OURS]
    for name in (PEFT, OURS):
        faults = ways[name].faults
        assert faults is not None and faults() == []
        assert saved_bytes(ways[name]) > 0
    assert {target.to for target in cell.targets} <= ways.keys()


def test_a_wrong_adapter_is_a_fault(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folded, "_N", 32)
    monkeypatch.setattr(folded, "_M", 9)
    ways = folded._ways("adalora")
    ours = ways[OURS]
    with torch.no_grad():
        ours.trained[1].mul_(1.01)
    assert ours.faults is not None and any("y is off" in fault for fault in ours.faults())
