"""The pretraining example: what its ways train, what its numbers are, and that its table and picture come out."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import measured_pages
from support.paths import ROOT

for _needed in ("transformers", "matplotlib", "rich"):
    pytest.importorskip(_needed)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("pretrain_relora")


@pytest.fixture
def parts(example: ModuleType) -> ModuleType:
    return sys.modules["_pretrain"]


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(97, 123, (64, 16), generator=torch.Generator().manual_seed(0))


def test_every_way_trains_on_the_same_batches_from_the_same_weights(example, parts, text) -> None:
    lengths = example.Lengths(warm_start=1, steps=4, every=2, warmup=1, measure=2)
    start = parts.make_model(1)
    data = parts.Data(text, text, text)
    before = parts.linear_weights(start)
    seen: dict[int, list[torch.Tensor]] = {}

    class Noted(example.Training):
        def step(self, batch: torch.Tensor) -> None:
            seen.setdefault(id(self), []).append(batch)
            super().step(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "Training", Noted)
        trainings = example.train(start, example.METHODS, data, lengths, 1, "")
    assert len(seen) == 6 and {len(batches) for batches in seen.values()} == {4}
    first = seen[id(trainings["LoRA"])]
    assert all(torch.equal(a, b) for batches in seen.values() for a, b in zip(batches, first, strict=True))
    assert all(torch.equal(weight, before[name]) for name, weight in parts.linear_weights(start).items())

    ranks = {
        name: {int(torch.linalg.matrix_rank(each - before[layer], rtol=1e-6)) for layer, each in found.items()}
        for name, found in ((name, parts.linear_weights(each.model)) for name, each in trainings.items())
    }
    assert ranks["LoRA"] == ranks["ReLoRA, no restarts"] == {example.RANK}
    for name in ("ReLoRA", "ReLoRA, no pruning", "ReLoRA, no re-warming"):
        assert ranks[name] == {2 * example.RANK}, "a restart adds r to the rank"
    assert {name: len(each.restart_seconds) for name, each in trainings.items() if each.restart_seconds} == {
        "ReLoRA, no pruning": 1,
        "ReLoRA, no re-warming": 1,
        "ReLoRA": 1,
    }
    assert {len(each.curve) for each in trainings.values()} == {3}
    assert len({each.curve[0] for each in trainings.values()}) == 1, "all begin with the same function"


def test_low_rank_ways_train_the_embeddings_norms_and_head_in_full(example, parts) -> None:
    start = parts.make_model(1)
    trained = {
        name: {
            n for n, p in example.Training(start, method, example.SHORT, 1).model.named_parameters() if p.requires_grad
        }
        for name, method in example.METHODS.items()
    }
    everything = {name for name, _ in start.named_parameters()}
    assert trained["full rank"] == everything
    in_full = {name for name in everything if "_proj" not in name}
    for name in example.METHODS.keys() - {"full rank"}:
        assert {n for n in trained[name] if "lora_" not in n} == in_full
        assert len({n for n in trained[name] if "lora_" in n}) == 2 * 7 * 2  # A and B of 7 linears in 2 layers


def test_the_rates_jag_only_where_they_are_said_to(example, parts, text) -> None:
    lengths = example.Lengths(steps=8, every=4, warmup=2)
    start = parts.make_model(1)
    rates = {}
    for name, method in example.METHODS.items():
        training = example.Training(start, method, lengths, 1)
        rates[name] = []
        for _ in range(lengths.steps):
            rates[name].append(training.optimizer.param_groups[0]["lr"] / method.rate)
            training.step(text[: example.BATCH])
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * (t - 2) / 6)) if t >= 2 else t / 2 for t in range(8)]
    jagged = [*cosine[:4], 0.0, cosine[6] / 2, *cosine[6:]]
    for name, method in example.METHODS.items():
        assert rates[name] == pytest.approx(jagged if method.rewarm else cosine), name


def test_ranks_and_singular_values_are_those_of_known_matrices(parts) -> None:
    assert parts.above(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)) == 3
    values = torch.tensor([2.0, 1.0, 0.021, 0.019], dtype=torch.float64)
    assert parts.above(values) == 3
    before = {"w": torch.eye(3, dtype=torch.float64)}
    after = {"w": torch.eye(3, dtype=torch.float64) + torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64))}
    assert parts.spectra(before, after)["w"].tolist() == pytest.approx([3, 2, 0])


def test_text_becomes_whole_sequences_of_bytes(parts) -> None:
    rows = parts.as_bytes(["a" * 100, "é" * 20])
    assert rows.shape == (2, parts.LENGTH) and rows.dtype == torch.int64
    assert bytes(rows.flatten().tolist()) == b"a" * 100 + b"\n\n" + "é".encode() * 13


def document(example: ModuleType, seeds: int) -> dict[str, Any]:
    """A document as the example writes it, of numbers that nobody has measured."""
    perplexity = dict(zip(example.METHODS, (4.0, 6.0, 6.5, 5.5, 5.25, 5.0), strict=True))
    runs = [
        {
            "method": name,
            "seed": seed,
            "rate": method.rate,
            "trained": 1234,
            "perplexity": perplexity[name] + 0.5 * (seed - 1),
            "curve": [14.0, 9.0, perplexity[name]],
            "seconds": [0.01, 0.0125, 0.02],
            "restart_seconds": 0.002 if method.restarts else None,
            "effective_rank": 3.0 * seed,
            "above": 4.0,
            "spectrum": [2.0, 1.0, 0.0],
        }
        for seed in range(1, seeds + 1)
        for name, method in example.METHODS.items()
    ]
    return {
        "date": "2030-01-01T00:00:00+00:00",
        "versions": {"torch": "9.9"},
        "device": {"type": "cpu", "name": "abacus", "threads": 2},
        "settings": {"steps": 4, "every": 2, "measure": 2, "warmup": 1, "warm_start": 3, "rank": 2},
        "parameters": 5678,
        "starts": [{"seed": seed, "perplexity": 14.0} for seed in range(1, seeds + 1)],
        "runs": runs,
        "rows": example.summary(runs),
    }


def test_the_table_the_picture_and_the_page_show_the_numbers(example, tmp_path, capsys) -> None:
    run = document(example, seeds=2)
    example.print_table(run)
    told = capsys.readouterr().out
    assert "5.25 ± 0.35" in told and "12.5 ms" in told and "A restart of all layers takes 2.0 ms" in told
    assert example.plot(run, tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")

    root = measured_pages.checkout(tmp_path / "checkout")
    measured_pages.put(root, "relora/a.json", run, png=True)
    assert measured_pages.load_script().main(["--root", str(root)]) == 0
    page = (root / "docs" / "relora.md").read_text()
    assert "| ReLoRA | 5.25 ± 0.35 | 0.02 | 1,234 | 4.5 | 4.0 | 12.5 ms |" in page
    assert "(../benchmarks/results/relora/a.png)" in page and "(../benchmarks/results/relora/a.json)" in page
    assert "2 seeds" in page and "-25% (ReLoRA, no restarts), 25% (ReLoRA, no pruning)" in page
    assert "50% (ReLoRA)." in page
    measured_pages.put(root, "relora/a.json", document(example, seeds=1), png=True)
    assert measured_pages.load_script().main(["--root", str(root)]) == 0
    page = (root / "docs" / "relora.md").read_text()
    assert "one seed" in page and "| ReLoRA | 5.00 |" in page


@pytest.mark.slow
def test_the_short_run_learns_in_every_way_and_records_nothing(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = []
    monkeypatch.setattr(example, "print_table", documents.append)
    monkeypatch.setattr(sys, "argv", ["pretrain_relora.py", "--short", "--out", str(tmp_path)])
    example.main()
    (found,) = documents
    assert (tmp_path / "pretrain_relora.png").exists() and "picture:" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["pretrain_relora.png"]
    (start,) = found["starts"]
    rows = {row["method"]: row for row in found["rows"]}
    assert rows.keys() == example.METHODS.keys()
    assert all(row["perplexity"][0] < 0.9 * start["perplexity"] for row in rows.values())
    assert (
        rows["LoRA"]["above"] <= example.RANK < rows["ReLoRA"]["above"] <= 2 * example.RANK < rows["full rank"]["above"]
    )
    assert rows["LoRA"]["trained"] == rows["ReLoRA"]["trained"] < rows["full rank"]["trained"] / 3
