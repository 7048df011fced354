"""``python -m lora_kernels analyse`` prints tables and writes JSON and pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from support.adapter_models import net, train
from torch import nn

from lora_kernels import apply_lora, save_adapter
from lora_kernels.__main__ import main
from lora_kernels.analysis import analyse

st = pytest.importorskip("safetensors.torch")
Console = pytest.importorskip("rich.console").Console


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[str, str]:
    """Two adapters of different rank, and their base."""
    for name, r in (("one", 2), ("two", 3)):
        model = net()
        apply_lora(model, r=r, target_modules=["inner.out"])
        save_adapter(train(model), tmp_path / name)
    torch.manual_seed(0)
    st.save_file(nn.Linear(8, 6).state_dict(prefix="inner.out."), tmp_path / "model.safetensors")
    return str(tmp_path / "one"), str(tmp_path / "two")


def test_it_prints_the_table_of_an_adapter_of_one_layer(adapters, capsys):
    assert main(["analyse", adapters[0]]) == 0
    out = capsys.readouterr().out
    assert f"{adapters[0]}: 1 update" in out and "suggested" in out and "inner.out" in out
    assert "Beside" not in out


def test_it_compares_reads_the_base_and_writes_files(adapters, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    base, out = str(tmp_path / "model.safetensors"), tmp_path / "out" / "numbers.json"
    more = ["--base", base, "--intruders", "--json", str(out), "--plot", str(tmp_path / "plots")]
    assert main(["analyse", *adapters, *more]) == 0
    text = capsys.readouterr().out
    assert f"Beside W, of {base}" in text and f"Beside {adapters[1]}" in text and "intruders" in text
    report = analyse(*adapters, base, intruders=True)
    assert json.loads(out.read_text()) == json.loads(report.to_json())
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "spectra.png", "effective_rank.png", "relative_norm.png", "amplification.png", "similarity.png",
        "similarity_inner_out.png",
    }  # fmt: skip
    assert all(str(path) in text for path in (tmp_path / "plots").iterdir())


@pytest.mark.parametrize("width", [50, 80, 200])
def test_a_table_that_is_wider_than_the_terminal_is_divided_and_no_word_is(width, adapters, tmp_path):
    console = Console(file=io.StringIO(), width=width)
    console.print(analyse(*adapters, tmp_path / "model.safetensors"))
    text = console.file.getvalue()
    tables = [line for line in text.splitlines() if line.startswith(" layer ")]
    assert len(tables) == (6 if width == 50 else 3)
    assert text.count("inner.out") == len(tables) and max(map(len, text.splitlines())) <= width
    assert all(word in text for word in ("effective", "suggested", "amplifi-", "‖UᵀWV‖", "φ(1, 1)", "cosine"))


def test_the_reference_of_the_weight_can_be_left_out(adapters, tmp_path, capsys):
    assert main(["analyse", adapters[0], "--base", str(tmp_path / "model.safetensors"), "--no-top"]) == 0
    out = capsys.readouterr().out
    assert "amplifi-" in out and "W's own" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{one}", "--intruders"], "say with --base where W is"),
        (["{one}/nowhere"], "there is no"),
        (["{one}", "--alpha", "2"], "is for files without a config"),
        (["{one}", "--base", "{one}/nowhere"], "no model of this name in the local cache"),
    ],
)
def test_an_error_is_one_line_that_says_what_is_wrong(arguments, message, adapters, capsys):
    assert main(["analyse", *(each.format(one=adapters[0]) for each in arguments)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("analyse: ") and message in err and err.count("\n") == 1
