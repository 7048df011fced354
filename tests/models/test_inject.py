"""`apply_lora` chooses the layers that PEFT would choose, and they compute what PEFT's compute."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from support.inject_models import MODELS, like_peft, llama, peft, peft_layers, plain, run, same_in_peft
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.models.inject import adapter_parameters, apply_lora, merge_and_unload, trainable_parameters
from lora_kernels.models.targets import by_pattern, matches

RULES = [
    ("plain", {"target_modules": "all-linear"}),
    ("plain", {"target_modules": ["first", "q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    ("llama", {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]}),
    ("neox", {"target_modules": ["dense"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("plain", {"target_modules": r"blocks\.\d\.(q|v)_proj", "exclude_modules": r".*\.2\..*"}),
    ("plain", {"target_modules": ["mlp", "q_proj"], "exclude_modules": ["blocks.0.mlp", "q_proj"]}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "ALL-linear", "exclude_modules": ["down_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]}),
    (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3, "1.mlp.up_proj": 5},
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 32, "v_proj": 1},
        },
    ),
    ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"proj": 2}, "use_rslora": True}),
    ("neox", {"target_modules": "all-linear"}),
    ("neox", {"target_modules": ["query_key_value"]}),
    ("bert", {"target_modules": "all-linear"}),
    ("plain", {"target_modules": "all-linear", "use_dora": True}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "use_rslora": True, "lora_alpha": 3}),
    ("bert", {"target_modules": ["query", "dense"], "use_dora": True, "rank_pattern": {"query": 3}}),
    ("bert", {"target_modules": r".*attention.*(query|value)", "lora_alpha": 3, "r": 4}),
]


@pytest.mark.parametrize(("kind", "rules"), RULES)
def test_the_layers_values_and_gradients_are_pefts(kind, rules):
    ours, theirs = like_peft(MODELS[kind]().double().eval(), **rules)
    theirs.eval()
    y, want = run(ours, kind), run(theirs, kind)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    layers = peft_layers(theirs)
    for name, layer in ours.named_modules():
        if isinstance(layer, FusedLoRALinear):
            other = layers[name]
            assert (layer.r, layer.scaling) == (other.r["default"], other.scaling["default"])
            same = same_in_peft(other)
            assert same.keys() == {n for n, _ in layer.named_parameters() if "lora_" in n}
            for part, parameter in same.items():
                torch.testing.assert_close(getattr(layer, part).grad, parameter.grad, rtol=1e-7, atol=1e-7)
    assert trainable_parameters(ours).trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert all(p.grad is None for n, p in ours.named_parameters() if "lora_" not in n)
    with torch.no_grad():
        torch.testing.assert_close(run(merge_and_unload(ours), kind), run(theirs.merge_and_unload(), kind))


PARTS = st.sampled_from(["a", "b", "ab", "0", "1", "fc", "q_proj"])
DOTTED = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@settings(deadline=None, max_examples=200)
@given(
    name=DOTTED,
    wanted=st.one_of(st.lists(DOTTED, max_size=3), st.sampled_from([r".*\.a", "a|b", r"(a|b)\..*", ".*q_proj"])),
    excluded=st.one_of(st.none(), st.lists(DOTTED, max_size=2), st.sampled_from([r".*\.0\..*", "fc"])),
    pattern=st.dictionaries(st.one_of(DOTTED, st.sampled_from(["^a", r"\d", "a|b.*"])), st.integers(1, 9), max_size=3),
)
def test_the_rules_for_names_are_pefts(name, wanted, excluded, pattern):
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    config = peft.LoraConfig(target_modules=wanted, exclude_modules=excluded)
    theirs = check_target_module_exists(config, name)
    assert (matches(wanted, name) and not matches(excluded or (), name)) == bool(
        theirs and type(theirs).__name__ != "_ExcludedModule"
    )
    assert by_pattern(pattern, name, 0) == pattern.get(get_pattern_key(pattern.keys(), name), 0)


def test_the_defaults_are_pefts():
    config, model = peft.LoraConfig(), plain()
    layer = apply_lora(model).layers[0]
    assert (layer.r, layer.lora_alpha) == (config.r, config.lora_alpha)
    assert model.first.lora_dropout == config.lora_dropout and model.first.use_rslora == config.use_rslora


def test_a_fresh_model_computes_its_base_and_shares_its_weights():
    model = plain()
    weight, want = model.first.weight, run(model, "plain")
    apply_lora(model, lora_dropout=0.5)
    assert model.first.weight is weight
    torch.testing.assert_close(run(model, "plain"), want)


def test_a_fresh_dora_model_computes_its_base():
    model = plain()
    want = run(model, "plain")
    report = apply_lora(model, target_modules=["q_proj"], use_dora=True, lora_dropout=0.5)
    torch.testing.assert_close(run(model, "plain"), want)
    assert all(layer.use_dora for layer in report.layers)
    assert re.search(r"^blocks\.0\.q_proj +8 +8 +8 → 8  DoRA$", report.table(full=True), re.M)


def test_the_settings_reach_the_layers():
    model = plain().bfloat16()
    apply_lora(model, r=3, lora_dropout=0.25, adapter_dtype=torch.float32, backend="eager", use_rslora=True)
    layer = model.blocks[0].q_proj
    assert (layer.r, layer.lora_dropout, layer.backend, layer.use_rslora) == (3, 0.25, "eager", True)
    assert layer.lora_A.dtype == torch.float32 and layer.scaling == 8 / 3**0.5


def test_the_report_names_replaced_left_and_unmatched():
    model = plain()
    report = apply_lora(
        model, target_modules=["q_proj", "nonsense"], exclude_modules=["blocks.1.q_proj"], rank_pattern={"v_proj": 2}
    )
    assert [layer.name for layer in report.layers] == ["blocks.0.q_proj", "blocks.2.q_proj"]
    assert (
        report.passed_over["blocks.1.q_proj"] == "in exclude_modules"
        and report.passed_over["first"] == "not in target_modules"
    )
    assert report.unused == ("nonsense", "rank_pattern v_proj")
    text, full = str(report), report.table(full=True)
    assert re.search(r"^blocks\.\{0,2\}\.q_proj × 2 +8 +8 +8 → 8$", text, re.M)
    assert re.search(r"^blocks\.2\.q_proj +8 +8 +8 → 8$", full, re.M)
    assert "DoRA" not in text
    assert "passed over, in exclude_modules: blocks.1.q_proj" in text
    assert "blocks.{0..2}.v_proj × 3" in text and "blocks.0.v_proj, " in full
    assert "matched nothing: nonsense, rank_pattern v_proj" in text


def test_tied_weights_stay_tied():
    model = llama(tie_word_embeddings=True)
    apply_lora(model, target_modules=["lm_head", "q_proj"])
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.requires_grad


def test_a_layer_at_two_places_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = apply_lora(model)
    assert model[0] is model[2] and isinstance(model[0], FusedLoRALinear) and len(report.layers) == 1
    merge_and_unload(model)
    assert model[0] is model[2] and type(model[0]) is nn.Linear


@pytest.mark.parametrize("padded", [False, True])
def test_the_inference_path_of_a_transformer_encoder_does_not_skip_the_adapters(padded):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2)
    apply_lora(model)
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    want = model(x, src_key_padding_mask=mask)[:, :3]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=mask)[:, :3], want)
