"""The benchmark of generation: every number is there and finite, and a wrong model gets none."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import generation
from benchmarks.generation_models import DENSE, FUSED, OURS, PEER, Models, Size

TINY = Size(hidden=64, intermediate=128, layers=2, heads=4, vocabulary=96, r=4, prompt=16, new=4)
WORDS = [f"--{name}={value}" for name, value in vars(TINY).items()]
HAVE_PEER = all(importlib.util.find_spec(name) for name in ("bitsandbytes", "accelerate"))
needs_peer = pytest.mark.skipif(not HAVE_PEER, reason="bitsandbytes and accelerate are not both installed")


@pytest.fixture
def no_peer(monkeypatch):
    """Hide bitsandbytes, as if it were not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))


@pytest.fixture
def wrong_scale(monkeypatch):
    """Make our model wrong: its adapters are a tenth too large."""
    apply = Models.apply

    def wrong(self, dtype):
        variant = apply(self, dtype)
        for layer in variant.model.modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B.data.mul_(1.1)
        return variant

    monkeypatch.setattr(Models, "apply", wrong)


@needs_peer
@pytest.mark.parametrize(("dtype", "double_quant"), [("bf16", True), ("fp32", False)])
def test_every_model_is_judged_and_timed(dtype, double_quant, tmp_path, capsys):
    path = tmp_path / "run.json"
    words = [*WORDS, "--rounds=3", f"--dtype={dtype}", f"--json={path}", *(["--double-quant"] if double_quant else [])]
    assert generation.main(words) == 0
    document = json.loads(path.read_text())
    names = [f"{OURS} {dtype}", f"{PEER} {dtype}", f"{FUSED} {dtype}", f"{DENSE} bf16", f"{DENSE} fp32"]
    rows = {row["name"]: row for row in document["rows"]}
    assert sorted(rows) == sorted(names) == sorted(entry["name"] for entry in document["gate"])
    for entry in document["gate"]:
        assert entry["faults"] == [] and set(entry["errors"]) == {"prompt", "single tokens"}
        assert all(0 < error < 0.1 for error in entry["errors"].values())
    for name, row in rows.items():
        numbers = [*row["tokens_per_second"], *row["seconds"], *(v for each in row["ratios"].values() for v in each)]
        assert all(math.isfinite(value) and value > 0 for value in numbers)
        assert set(row["ratios"]) == {f"{PEER} {dtype}", f"{DENSE} bf16", f"{DENSE} fp32"} - {name}
        # Both are medians of three rounds.
        assert row["tokens_per_second"][1] * row["seconds"][1] == pytest.approx(TINY.new)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # the number of elements in the linears that have adapters
    assert rows[f"{DENSE} fp32"]["weight_bytes"] == 2 * rows[f"{DENSE} bf16"]["weight_bytes"] == 4 * weights
    scales = weights // 64 * (1 if double_quant else 4)
    stored = rows[f"{OURS} {dtype}"]["weight_bytes"]
    assert stored == rows[f"{PEER} {dtype}"]["weight_bytes"] == rows[f"{FUSED} {dtype}"]["weight_bytes"]
    assert (stored > weights // 2 + scales) if double_quant else (stored == weights // 2 + scales)
    said = capsys.readouterr().out
    assert "no fault in 5 checks" in said and all(name in said for name in names)


def test_without_bitsandbytes_the_others_are_measured(no_peer, capsys):
    assert generation.main([*WORDS, "--rounds=1"]) == 0
    said = capsys.readouterr().out
    assert "no fault in 3 checks" in said and "pip install bitsandbytes" in said
    assert (
        f"{OURS} bf16" in said and f"{DENSE} fp32" in said and PEER not in said.replace(f"{PEER} is not measured", "")
    )


def test_a_wrong_model_gets_no_number(no_peer, wrong_scale, tmp_path, capsys):
    assert generation.main([*WORDS, "--dtype=fp32", f"--json={tmp_path / 'run.json'}"]) == 1
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["rows"] == [] and "RMS error" in capsys.readouterr().out
    assert {entry["name"] for entry in document["gate"] if entry["faults"]} == {f"{OURS} fp32"}


def test_a_comparison_must_be_the_same_function():
    want = {"prompt": torch.randn(8, 8, dtype=torch.float64)}
    assert generation.peer_faults({"prompt": want["prompt"].bfloat16()}, want) == []
    for other in (1.2 * want["prompt"], torch.full_like(want["prompt"], float("nan"))):
        assert "from fp64" in generation.peer_faults({"prompt": other}, want)[0]


def test_tokens_that_are_missing_are_an_error():
    class Silent:
        def generate(self, input_ids, **settings):
            return input_ids

    with pytest.raises(RuntimeError, match="0 new tokens, asked for 3"):
        generation.generate(Silent(), torch.zeros(1, 2, dtype=torch.long), 3)


@pytest.mark.parametrize(
    ("words", "fault"),
    [(["--rounds", "0"], "rounds must be at least 1"), (["--hidden", "65"], "multiple of 2 · heads")],
)
def test_options_that_make_no_sense_are_refused(words, fault, capsys):
    with pytest.raises(SystemExit):
        generation.main(words)
    assert fault in capsys.readouterr().err
