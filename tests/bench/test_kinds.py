"""The suite `kinds` of the bench: every way is judged before it is timed, and targets of time and of bytes are held."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.__main__ import main
from lora_kernels.bench.kinds import cells as kinds_cells
from lora_kernels.bench.kinds import measure, report
from lora_kernels.bench.kinds.cells import FROZEN, KINDS, OURS, PEFT, SAVED, Cell, Target, Way


def bench(*words: str) -> int:
    return main(["bench", "--device", "cpu", "--suite", "kinds", "--rounds", "2", *words])


def ways(fault: str = "") -> dict[str, Way]:
    x, w = torch.randn(8, 16, requires_grad=True), nn.Parameter(torch.randn(16, 16))

    def slow() -> Tensor:
        return sum((x.sin() * x.cos() @ w for _ in range(20)), torch.zeros(()))

    faults = [fault] if fault else []
    return {
        FROZEN: Way(lambda: x @ w.detach(), (x,), (w,)),
        PEFT: Way(slow, (x, w), faults=list),
        OURS: Way(lambda: x @ w, (x, w), faults=lambda: faults),
    }


TARGETS = (Target(PEFT, 0.9), Target(PEFT, 0.5, SAVED), Target(FROZEN, 0.0, SAVED))


def test_a_run_writes_times_and_bytes_and_tells_which_targets_are_met(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kinds_cells, "cells", lambda kinds: [Cell("small", "8 rows", ways, TARGETS)])
    out = tmp_path / "run.json"
    assert bench("--out", str(out), "--plot") == 0
    document = json.loads(out.read_text())
    (ours,) = [e for e in document["timings"] if e["way"] == OURS]
    assert ours["saved"] == 8 * 16 * 4  # x; w is a parameter
    assert [target["met"] for target in ours["targets"]] == [True, True, False]
    assert re.search(r"Targets: 2 of 3 met", capsys.readouterr().out)
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_way_that_is_wrong_gets_no_number(monkeypatch, capsys):
    monkeypatch.setattr(
        kinds_cells, "cells", lambda kinds: [Cell("small", "8 rows", lambda: ways("y is off"), TARGETS)]
    )
    assert bench() == 1
    said = capsys.readouterr().out
    assert "y is off" in said and "red" in said and "Targets: 0 of 0 met" in said


def test_a_cell_whose_package_is_missing_is_told(monkeypatch, capsys):
    def missing() -> dict[str, Way]:
        raise ImportError("no module named peft")

    monkeypatch.setattr(kinds_cells, "cells", lambda kinds: [Cell("small", "8 rows", missing, TARGETS)])
    bench()
    assert "not measured: no module named peft" in capsys.readouterr().out


def test_a_forward_alone_runs_without_gradients_and_saves_nothing():
    seen = []

    def forward() -> Tensor:
        seen.append(torch.is_grad_enabled())
        return torch.zeros(1)

    cell = Cell("small", "forward", dict, backward=False)
    measure._step(cell, Way(forward))()
    assert seen == [False]
    assert report.size({"name": "a", "dtype": "float32", "backward": False}) == "a, forward"


def test_kinds_are_for_their_suite_alone(capsys):
    assert main(["bench", "--device", "cpu", "--suite", "many", "--kinds", "conv"]) == 2
    assert "--kinds goes with --suite kinds" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_cells_with_targets(kind):
    found = kinds_cells.cells([kind])
    assert len({(cell.kind, cell.name, cell.dtype, cell.backward) for cell in found}) == len(found) > 0
    assert any(cell.targets for cell in found)
