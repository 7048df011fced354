"""The benchmark of generation with an adapter for each row: every number is there, and a wrong model gets none."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support import measured_pages

from benchmarks import generation_many, generation_many_models
from benchmarks.generation import logits
from benchmarks.generation_many_models import BASE, FUSED, PEFT, RANKS, Models
from benchmarks.generation_models import SCALE, Size

TINY = Size(hidden=64, intermediate=128, layers=2, heads=4, vocabulary=96, prompt=16, new=4)
WORDS = [f"--{name}={value}" for name, value in vars(TINY).items() if name != "r"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Four adapters at most, since PEFT takes long to add them."""
    for module in (generation_many, generation_many_models):
        monkeypatch.setattr(module, "ADAPTERS", 4)
    monkeypatch.setattr(generation_many, "COUNTS", {1: 4, 4: 8})
    monkeypatch.setattr(generation_many, "TARGETS", {4: 0.5})


def test_every_model_is_judged_and_timed(tmp_path, capsys):
    path = tmp_path / "run.json"
    assert generation_many.main([*WORDS, "--rounds=2", f"--json={path}", "--plot"]) == 0
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    document = json.loads(path.read_text())
    assert [entry["name"] for entry in document["gate"]] == [
        f"{m}, {n} adapters" for n in (1, 4) for m in (PEFT, FUSED)
    ]
    assert all(entry["faults"] == [] and 0 < max(entry["errors"].values()) < 1e-4 for entry in document["gate"])
    rows = {(row["n"], row["name"]): row for row in document["rows"]}
    assert rows.keys() == {(n, name) for n in (1, 4) for name in (BASE, PEFT, FUSED)}
    for row in rows.values():
        assert 0 < row["tokens_per_second"][0] <= row["tokens_per_second"][2]
    assert rows[4, BASE]["of_base"] == [1.0, 1.0, 1.0] and rows[4, FUSED]["batch"] == 8
    assert rows[4, FUSED]["target"] == 0.5 and rows[1, FUSED]["target"] is None
    assert "no fault in 4 checks" in capsys.readouterr().out
    root = measured_pages.checkout(tmp_path / "checkout")
    measured_pages.put(root, "generation_many/a.json", document, png=True)
    text = measured_pages.page_of_measurements(root)
    speeds = [f"{rows[4, name]['tokens_per_second'][1]:.1f}" for name in (BASE, PEFT, FUSED)]
    assert f"| 8, 4 | {speeds[0]} | {speeds[1]} | **{speeds[2]}** |" in text and "generation_many/a.png" in text


def test_a_target_is_met_by_what_is_shown():
    assert generation_many.target_words({"of_base": (0.8, 0.876, 0.9), "target": 0.88}) == "≥ 0.88 met"
    assert generation_many.target_words({"of_base": (0.8, 0.874, 0.9), "target": 0.88}) == "≥ 0.88 missed"
    assert generation_many.target_words({"of_base": (1.0, 1.0, 1.0)}) == ""


def test_the_exact_model_has_the_adapter_of_each_row(tmp_path):
    models = Models(str(tmp_path), TINY)
    tokens = torch.randint(TINY.vocabulary, (3, 6))
    ids = torch.tensor([2, 0, 2])
    assert [models.values["model.layers.0.mlp.down_proj"][i][0].shape[0] for i in range(4)] == list(RANKS)
    together = logits(models.exact(ids), tokens, 4)["prompt"].view(3, 4, -1)
    for row, i in enumerate(ids.tolist()):
        merged = models.exact(torch.tensor([i]))
        for name, pairs in models.values.items():
            layer = merged.get_submodule(name)
            a, b = pairs[i]
            layer.weight.data += SCALE * b.double() @ a.double()
            layer.pairs.clear()
        alone = logits(merged, tokens[row : row + 1], 4)["prompt"]
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)  # norms are computed in fp32


def test_a_wrong_model_gets_no_number(tmp_path, monkeypatch, capsys):
    right = Models.__init__

    def wrong(self, *args):
        right(self, *args)
        for layer in self.fused.modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B["3"].weight.data = 1.1 * layer.lora_B["3"].weight.data

    monkeypatch.setattr(Models, "__init__", wrong)
    assert generation_many.main([*WORDS, "--rounds=1", f"--json={tmp_path / 'run.json'}"]) == 1
    document = json.loads((tmp_path / "run.json").read_text())
    assert {row["n"] for row in document["rows"]} == {1}, "adapter 3 is only among four"
    assert [entry["name"] for entry in document["gate"] if entry["faults"]] == [f"{FUSED}, 4 adapters"]
    assert "RMS error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fault"),
    [(["--rounds", "0"], "rounds must be at least 1"), (["--hidden", "65"], "multiple of 2 · heads")],
)
def test_options_that_make_no_sense_are_refused(words, fault, capsys):
    with pytest.raises(SystemExit):
        generation_many.main(words)
    assert fault in capsys.readouterr().err
