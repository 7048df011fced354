"""The sweep of examples/rank_sweep.py runs in a few steps, and README's lines say what its document says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.measured_pages import checkout, load_script, put
from support.paths import ROOT

for _needed in ("sklearn", "matplotlib", "rich", "tqdm"):
    pytest.importorskip(_needed)


@pytest.fixture
def rank_sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("rank_sweep")


@pytest.mark.slow
def test_the_sweep_trains_every_choice_at_every_rank_and_at_equal_cost(
    rank_sweep: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = rank_sweep.Lengths(pretrain_epochs=1, steps=5, seeds=2, ranks=(1, 8, 64))
    document = rank_sweep.run(tmp_path / "sweep", lengths, "python examples/rank_sweep.py")

    assert json.loads((tmp_path / "sweep.json").read_text()) == json.loads(json.dumps(document))
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    points = {(point["weights"], point["r"]): point for point in document["points"]}
    # One rank of a linear layer of width 96 costs 192, and of the MLP's 480; there are three blocks.
    each = {"{q}": 576, "{q, v}": 1152, "{q, k, v, o}": 2304, "all linear": 5184}
    assert all(point["parameters"] == r * each[name] for (name, r), point in points.items())
    assert document["equal"] == {
        "parameters": 10368,
        "ranks": {"{q}": 18, "{q, v}": 9, "{q, k, v, o}": 4, "all linear": 2},
    }
    wanted = {(name, r) for name in each for r in (1, 8, 64)} | set(document["equal"]["ranks"].items())
    assert points.keys() == wanted
    assert all(len(point["accuracies"]) == 2 for point in points.values())
    cut = document["cut"]
    assert (cut["weights"], cut["from"], [point["r"] for point in cut["points"]]) == ("all linear", 64, [1, 8])
    assert all(len(point["accuracies"]) == 2 for point in cut["points"])
    phi = torch.tensor(document["similarity"]["phi"])
    assert phi.shape == (8, 8) and bool(((phi >= 0) & (phi <= 1)).all())
    told = capsys.readouterr().out
    assert all(name in told for name in each) and "10,368" in told


def test_two_seeds_begin_with_other_numbers(rank_sweep: ModuleType) -> None:
    """φ of adapters of one seed would compare the numbers with which they began."""
    training, _ = rank_sweep.load_data()
    data = rank_sweep.TensorDataset(training.rotated, training.labels)
    model = rank_sweep.ViT().eval()
    low, high = rank_sweep.COMPARED
    name = rank_sweep.OF
    jobs = rank_sweep.Jobs(model, [rank_sweep.job(name, low, data, 5, 0), rank_sweep.job(name, high, data, 5, 1)])
    first, second = (rank_sweep.factors(jobs, f"{name} r {r}")[0] for r in (low, high))
    phi = rank_sweep.subspace_similarity((first, first.T), (second, second.T))
    assert phi[0, 0] < 0.3  # 1/96 is expected, and 1 from one seed


def test_the_pages_say_what_the_document_says(tmp_path: Path) -> None:
    points = [
        {"weights": name, "r": r, "parameters": cost * r, "accuracies": [value - 0.01, value + 0.01]}
        for name, cost, values in (("{q}", 10, (0.2, 0.3, 0.4)), ("all", 20, (0.5, 0.75, 0.8)))
        for r, value in zip((1, 2, 4), values, strict=True)
    ]
    document = {
        "date": "2030-01-01T00:00:00+00:00",
        "command": "python examples/rank_sweep.py --record",
        "versions": {"torch": "2.13"},
        "device": {"type": "cpu", "name": "A", "threads": 2},
        "setting": {"steps": 9, "batch": 8, "rate": 0.005, "alpha": 8, "seeds": 2, "rotated": 0.123, "upright": 0.9},
        "points": points,
        "equal": {"parameters": 40, "ranks": {"{q}": 4, "all": 2}},
        "cut": {
            "weights": "all",
            "from": 4,
            "points": [{"r": r, "accuracies": [value]} for r, value in ((1, 0.4), (2, 0.7))],
        },
    }
    root = checkout(tmp_path / "checkout")
    path = put(root, "ranks/a.json", document, png=True)
    script = load_script()
    assert script.main(["--root", str(root)]) == 0
    page = (root / "docs" / "ranks.md").read_text()
    assert "| {q} | 20.0% ± 1.0 | 30.0% ± 1.0 | 40.0% ± 1.0 |" in page
    assert "| all, cut from 4 | 40.0% ± 0.0 | 70.0% ± 0.0 |  |" in page
    assert "| all | 2 | 40 | 75.0% ± 1.0 |" in page and "](../benchmarks/results/ranks/a.png)" in page

    run = script.Run.read(path, root / "README.md", root)
    lines = importlib.import_module("ranks_tables").short({"ranks": [run]}).splitlines()
    assert len(lines) == 3 and "](benchmarks/results/ranks/a.png)" in lines[0]
    assert (
        lines[1]
        == "A small vision transformer on a new task: 40 parameters reach 40% on {q} at rank 4, 75% on all at rank 2."
    )
    assert (
        lines[2].startswith("From rank 1 to rank 4: {q} 20% to 40%, all 50% to 80%.") and "(docs/ranks.md)" in lines[2]
    )
    assert "Trained at rank 4 and cut to 2 by `resize_adapter`, all reach 70%; trained at 2, 75%." in lines[2]
