"""`budget` against exact arithmetic, the numbers of the LoRA paper, and the parameters that adapters really have."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels.analysis import budget
from lora_kernels.analysis import progress as bars

NAMES = ("q", "q, v", "q, k, v, o", "all-linear")


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))


def stack(depth: int, width: int) -> nn.Module:
    with torch.device("meta"):
        return nn.ModuleDict({"layers": nn.ModuleList(Attention(width) for _ in range(depth))})


def test_gpt3_has_the_ranks_of_the_papers_table_5():
    # 96 layers of width 12,288 and about 18 million parameters: r 8 on one kind of weights, 4 on two, 2 on four.
    found = budget(stack(96, 12288), parameters=96 * 2 * 12288 * 8)
    assert [(c.name, c.r, c.parameters) for c in found.choices[:3]] == [
        ("q", 8, 18_874_368),
        ("q, v", 4, 18_874_368),
        ("q, k, v, o", 2, 18_874_368),
    ]
    assert found["all-linear"].parameters == found["q, k, v, o"].parameters


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_ranks_are_rounded_down_and_never_cost_more(extra):
    model = stack(2, 10)  # one rank of q costs 40
    found = budget(model, parameters=120 + extra)
    assert [c.r for c in found.choices] == [3 if extra >= 0 else 2, 1, 0, 0]
    assert all(c.parameters <= found.parameters for c in found.choices)
    assert [c.reason for c in found.choices] == ["", "", "rank 1 costs 160", "rank 1 costs 160"]


def test_r_spends_what_it_costs_on_every_linear_layer():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    found = budget(model, r=4)
    assert found.parameters == 4 * (3 + 5 + 5 + 7) and found["all-linear"].r == 4
    assert found["q"].reason == "no layers found for q" and found["q"].r == 0


def tiny(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    configs = {
        "Llama": small | {"num_key_value_heads": 2, "vocab_size": 32},
        "Qwen2": small | {"num_key_value_heads": 1, "vocab_size": 32},
        "GPT2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 32},
        "Bert": small | {"vocab_size": 32},
        "ViT": small | {"image_size": 8, "patch_size": 4},
        "GPTNeoX": small | {"vocab_size": 32},
        "T5": {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32},
        "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 32},
        "Phi3": small | {"vocab_size": 32, "pad_token_id": 0},
    }
    config = getattr(transformers, f"{family}Config")(**configs[family])
    with torch.device("meta"):
        return getattr(transformers, f"{family}Model")(config)


@pytest.mark.parametrize(
    ("family", "targets", "layers"),
    [
        ("Llama", [["q_proj"], ["q_proj", "v_proj"], ["k_proj", "o_proj", "q_proj", "v_proj"]], (2, 4, 8, 14)),
        ("Qwen2", [["q_proj"], ["q_proj", "v_proj"], ["k_proj", "o_proj", "q_proj", "v_proj"]], (2, 4, 8, 14)),
        ("ViT", [["q_proj"], ["q_proj", "v_proj"], ["k_proj", "o_proj", "q_proj", "v_proj"]], (2, 4, 8, 13)),
        ("T5", [["q"], ["q", "v"], ["k", "o", "q", "v"]], (3, 6, 12, 16)),
        ("DistilBert", [["q_lin"], ["q_lin", "v_lin"], ["k_lin", "out_lin", "q_lin", "v_lin"]], (2, 4, 8, 12)),
        (
            "Bert",
            [
                ["query"],
                ["query", "value"],
                [
                    "attention.output.dense",
                    "attention.self.key",
                    "attention.self.query",
                    "attention.self.value",
                ],
            ],
            (2, 4, 8, 13),
        ),
        ("GPT2", [[], [], ["attn.c_attn", "attn.c_proj"]], (0, 0, 4, 8)),
        ("GPTNeoX", [[], [], ["dense", "query_key_value"]], (0, 0, 4, 8)),
        ("Phi3", [[], [], ["o_proj", "qkv_proj"]], (0, 0, 4, 8)),
    ],
)
def test_the_projections_are_found_and_the_adapters_have_as_many_parameters(family, targets, layers):
    model = tiny(family)
    if family == "ViT" and not any(name.endswith("q_proj") for name, _ in model.named_modules()):
        dense = [f"attention.attention.{name}" for name in ("key", "query", "value")]
        targets = [["query"], ["query", "value"], [*dense, "attention.output.dense"]]  # in transformers 5.4
    found = budget(model, r=2)
    assert [len(choice.layers) for choice in found.choices] == list(layers)
    assert [choice.target_modules for choice in found.choices[:3]] == targets
    for choice in found.choices:
        if not choice.layers:
            assert "computes q, k, v at once (2 such layers)" in choice.reason and choice.r == 0
            continue
        adapted = tiny(family)
        report = lora_kernels.apply_lora(adapted, r=choice.r, target_modules=choice.target_modules)
        assert sorted(layer.name for layer in report.layers) == sorted(choice.layers)
        assert sum(p.numel() for p in lora_kernels.adapter_parameters(adapted)) == choice.parameters
        assert choice.parameters <= found.parameters < choice.parameters + choice.each


def test_groups_of_the_callers_are_counted_alone():
    model = stack(2, 10)
    found = budget(model, r=3, groups={"v": ["v_proj"], "first": r"layers\.0\..*", "all": "all-linear"})
    assert [(c.name, c.each, c.r) for c in found.choices] == [("v", 40, 12), ("first", 80, 6), ("all", 160, 3)]
    # The names of "first" alone end as those of the other layer.
    assert found["first"].target_modules == [f"0.{each}" for each in ("k_proj", "o_proj", "q_proj", "v_proj")]
    with pytest.raises(KeyError, match="there are 'v', 'first', 'all'"):
        found["q"]


def test_the_output_head_and_the_projection_inside_of_an_attention_are_left_out():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 6))
    assert budget(model, r=1)["all-linear"].layers == ("1",)


def test_the_table_shows_every_choice():
    rich = pytest.importorskip("rich.console")
    found = budget(stack(2, 10), parameters=100)
    console = rich.Console(width=100, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    console.print(found)
    for text in (str(found), console.export_text()):
        assert all(name in text for name in NAMES) and "rank 1 costs 160" in text and "at most 100 parameters" in text


def test_what_has_no_budget_is_refused_by_value():
    model, adapted = stack(1, 4), nn.Sequential(nn.Linear(4, 4))
    lora_kernels.apply_lora(adapted, r=2, target_modules=["0"])
    for told, args in (
        ("give parameters or r", (model,)),
        ("give parameters or r", (model, 5, 5)),
        ("parameters must be an integer of at least 1, got 0", (model, 0)),
        ("r must be an integer of at least 1, got 1.5", (model, None, 1.5)),
        ("has adapters in 0", (adapted, 5)),
        ("has no linear layers", (nn.Sequential(nn.ReLU()), 5)),
        ("group 'x' names no linear layer", (model, 5, None, {"x": ["nothing"]})),
    ):
        with pytest.raises(ValueError, match=told):
            budget(*args)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_only(terminal, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(bars.over([1, 2, 3], "count")) == [1, 2, 3]
    shown = capsys.readouterr()
    assert not shown.out and bool(shown.err.strip()) == terminal
