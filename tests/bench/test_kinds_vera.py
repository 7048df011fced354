"""The rows of VeRA in the bench: every way computes the function of its cell."""

from __future__ import annotations

import pytest

pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from lora_kernels.bench.kinds import vera
from lora_kernels.bench.kinds.cells import FROZEN, OURS, PEFT
from lora_kernels.bench.kinds.measure import saved_bytes


@pytest.mark.parametrize("training", [True, False])
def test_every_way_is_right_at_a_small_size(training: bool):
    M, K, N, r = 96, 24, 40, 8
    ways = vera._ways(M, K, N, r, training)
    assert list(ways) == [FROZEN, PEFT, OURS]
    for name in (PEFT, OURS):
        faults = ways[name].faults
        assert faults is not None and faults() == []
    assert saved_bytes(ways[OURS]) <= M * r * 4 + 64 < M * N * 4 <= saved_bytes(ways[PEFT])


def test_the_cells_have_names_of_their_own_and_what_they_are_held_to():
    found = vera.cells()
    assert len({cell.name for cell in found}) == len(found)
    assert all(target.to == PEFT for cell in found for target in cell.targets)
    assert {cell.backward for cell in found} == {True, False}
