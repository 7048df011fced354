"""The options of ``verify``: what they ask for, and the sizes of a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from lora_kernels.__main__ import main
from lora_kernels.tools.verify import options
from lora_kernels.tools.verify.model import projections

LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
QWEN = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
MISTRAL = {**LLAMA, "head_dim": 128, "sliding_window": None}
GEMMA = {"hidden_size": 3072, "intermediate_size": 24576, "num_attention_heads": 16, "head_dim": 256}
VIT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224}
QKV = [(4096, 4096), (4096, 1024)]
MLP = [(4096, 14336), (14336, 4096)]


def wanted(*words: str) -> options.Wanted:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    found = options.wanted(parser.parse_args(words))
    assert isinstance(found, options.Wanted), found
    return found


def write(path: Path, config: object) -> Path:
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (LLAMA, [*QKV, *MLP]),
        (QWEN, [(3584, 3584), (3584, 512), (3584, 18944), (18944, 3584)]),
        (MISTRAL, [*QKV, *MLP]),
        (GEMMA, [(3072, 4096), (4096, 3072), (3072, 24576), (24576, 3072)]),
        (VIT, [(768, 768), (768, 3072), (3072, 768)]),
        ({"text_config": LLAMA, "vision_config": VIT}, [*QKV, *MLP]),
    ],
    ids=["Llama-3.1-8B", "Qwen2.5-7B", "Mistral-7B", "Gemma-7B", "ViT-base", "text and vision"],
)
def test_the_layers_of_a_model_are_read_from_its_config(config: dict, sizes: list, tmp_path: Path) -> None:
    assert projections(write(tmp_path / "config.json", config)) == sizes
    assert projections(tmp_path) == sizes, "a folder with a config.json"
    passes = wanted("--model", str(tmp_path)).passes
    assert {(each.size.K, each.size.N) for each in passes} == set(sizes)
    assert {each.size.M for each in passes} == {1, 16, 2048, 8192}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ('{"a":' * 100_000, "is no JSON"),
        ([], "holds list"),
        (
            {"n_embd": 768, "hidden_size": None},
            "has no hidden_size and no num_attention_heads and no inter",
        ),
        ({**LLAMA, "hidden_size": "4096"}, "hidden_size is '4096'"),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads is 0"),
        ({**LLAMA, "num_key_value_heads": True}, "num_key_value_heads is True"),
        ({**LLAMA, "num_attention_heads": 30}, "hidden_size 4096 is no multiple of num_attention_heads 30"),
        ({**LLAMA, "intermediate_size": 14337}, "a layer of 4096→14337 is not measured"),
    ],
)
def test_a_config_that_gives_no_sizes_is_refused(config, text: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "config.json"
    if isinstance(config, str):
        path.write_text(config)
    elif config is not None:
        write(path, config)
    assert main(["verify", "--model", str(path)]) == 2
    assert text in " ".join(capsys.readouterr().out.split())


def test_a_name_that_no_file_can_have_is_refused(capsys) -> None:
    assert main(["verify", "--model", 5000 * "a"]) == 2
    assert "cannot be read" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("text", ["8x8", "8x8x8", "0x8x8:4", "8x8x8:0", "8x12x8:4", "8x8x9:4", "ax8x8:4", "8x8x8:4:4"])
def test_a_text_that_names_no_shape_is_refused(text: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--shapes", text])
    assert stopped.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--double-quant"], "--double-quant goes with --quant nf4 or fp4, not with a dense w"),
        (["--double-quant", "--quant", "int8"], "not with int8"),
        (["--jobs", "0"], "at least one process"),
        (["--device", "hal9000"], "--device hal9000"),
    ],
)
def test_options_that_cannot_be_served_are_refused(words: list[str], text: str, capsys) -> None:
    assert main(["verify", *words]) == 2
    assert text in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [["--dropout", "1"], ["--timeout", "0"], ["--seconds", "x"], ["--dtype", "fp32"]])
def test_values_out_of_range_are_refused(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *words])
    assert stopped.value.code == 2 and words[1] in capsys.readouterr().err


def test_by_default_llama_is_timed_in_training_and_decoding() -> None:
    found = wanted()
    training = {(each.size, each.p, each.op) for each in found.passes if each.size.M > 64}
    assert len(training) == 2 * 3 * 2 * 2 and {p for _, p, _ in training} == {0.0, 0.05}
    assert [str(each) for each in found.passes if each.size.M <= 64] == [
        "1x4096x4096:16 p=0 forward", "16x4096x4096:16 p=0 forward",
    ]  # fmt: skip
    assert {each.adapter_dtype for each in found.judged} == {torch.bfloat16, torch.float32}
    assert found.timed[:2] == (torch.bfloat16, torch.float32)
    quick = wanted("--quick")
    assert len(quick.passes) < len(found.passes) and quick.rounds < found.rounds and quick.most == 1


def test_types_are_those_that_were_asked_for() -> None:
    found = wanted("--dtype", "fp16", "--adapters", "x", "--quant", "nf4", "--double-quant", "--shapes", "8x8x8:4")
    assert found.timed[:2] == (torch.float16, torch.float16) and found.timed.w_format == "nf4 nested"
    assert all(each.quant == "nf4" and each.dtype == torch.float16 for each in found.judged)
    assert [str(each) for each in found.passes] == ["8x8x8:4 p=0 forward"]
