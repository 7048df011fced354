"""examples/initialisations.py compares the initialisations in a few steps, each from the same outputs."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.paths import ROOT

for _needed in ("sklearn", "matplotlib", "rich", "tqdm"):
    pytest.importorskip(_needed)


@pytest.fixture
def initialisations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("initialisations")


@pytest.mark.slow
def test_every_initialisation_is_trained_at_every_rate(
    initialisations: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialisations, "RATES", (1e-3, 1e-2))
    results = initialisations.run(tmp_path, initialisations.Lengths(pretrain_epochs=1, steps=4))

    assert set(results) == set(initialisations.INITS)
    first = [run.losses[0] for runs in results.values() for run in runs.values()]
    assert len(first) == 12 and all(len(run.losses) == 4 for runs in results.values() for run in runs.values())
    torch.testing.assert_close(torch.tensor(first), torch.full((12,), first[0]), rtol=1e-3, atol=0)
    assert len({tuple(run.losses) for runs in results.values() for run in runs.values()}) == 12
    told = capsys.readouterr().out
    assert all(init in told for init in initialisations.INITS)
    assert (tmp_path / "initialisations.png").read_bytes().startswith(b"\x89PNG")
