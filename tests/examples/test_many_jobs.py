"""The sweep of examples/many_jobs.py runs in a few steps, and its jobs do together what they do alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT

for _needed in ("sklearn", "matplotlib", "rich", "tqdm"):
    pytest.importorskip(_needed)


@pytest.fixture
def many_jobs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("many_jobs")


def test_the_sweep_gives_together_what_it_gives_alone(
    many_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many_jobs, "RATES", (3e-3,))
    results = many_jobs.run(tmp_path, many_jobs.Lengths(pretrain_epochs=1, steps=5))

    assert list(results.together) == list(results.alone) == list(results.seconds_alone)
    assert len(results.together) == 2
    for name, one in results.together.items():
        assert one.losses == pytest.approx(results.alone[name].losses, rel=1e-3)
        assert len(one.losses) == 5
    assert len({tuple(one.losses) for one in results.together.values()}) == 2

    told = capsys.readouterr().out
    assert all(name in told for name in results.together) and "together" in told
    assert (tmp_path / "many_jobs.png").read_bytes().startswith(b"\x89PNG")
