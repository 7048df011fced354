"""`pairs` finds every A and B of a model, says what they are, and gives them as matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.frozen_models import TIED, tied_llama
from support.kind_models import KIND_MODELS
from support.layer_kinds import KINDS
from torch import Tensor, nn
from torch.nn.utils import prune

import lora_kernels
from lora_kernels import FusedLoRALinear, analysis, apply_lora, train
from lora_kernels.models.pairs import ATTENTION, CONV, EMBEDDING, EXPERTS, LINEAR, Pair, pairs

peft = pytest.importorskip("peft")
from lora_kernels.peft.attention import counted  # noqa: E402

EXPECTED = {
    "embedding": [("0", EMBEDDING, ""), ("3", LINEAR, "")],
    "convolution": [("0", CONV, ""), ("2", CONV, ""), ("4", LINEAR, "")],
    "attention": [("attn", ATTENTION, ""), ("attn", ATTENTION, "out_proj")],
    "experts": [
        ("model.layers.0.self_attn.q_proj", LINEAR, ""),
        ("model.layers.1.self_attn.q_proj", LINEAR, ""),
        ("model.layers.1.mlp.experts", EXPERTS, "gate_up_proj"),
        ("model.layers.1.mlp.experts", EXPERTS, "down_proj"),
    ],
    "one stack of experts": [("model.layers.1.mlp.experts", EXPERTS, "down_proj")],
    "Conv1D": [(f"transformer.h.{i}.attn.c_attn", LINEAR, "") for i in range(2)],
}
"""The name, kind and part of each update of the models of `KIND_MODELS`."""


def with_values(model: nn.Module) -> nn.Module:
    """Give every adapter values that are not zero, and differ from each other's."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                parameter.normal_()
    return model


def what(found: list[Pair]) -> list[tuple[str, str, str]]:
    return [(pair.name, pair.kind, pair.part) for pair in found]


def delta(pair: Pair) -> Tensor:
    """Return s·B A in fp64, a matrix [N, K] for each group."""
    return pair.scale * pair.as_b(pair.b.detach()).double() @ pair.as_a(pair.a.detach()).double()


def as_stored(change: Tensor, pair: Pair, like: Tensor) -> Tensor:
    """Return the [groups, N, K] of `delta` in the layout of the weight `like`."""
    if pair.kind == EMBEDDING or (pair.kind == LINEAR and change[0].shape != like.shape):  # a Conv1D stores Wᵀ
        return change[0].t()
    return change.reshape(like.shape)


def weight_of(layer: Any, part: str) -> Tensor:
    if hasattr(layer, "in_proj_weight"):
        return layer.out_proj.weight if part else layer.in_proj_weight
    return getattr(layer, part or "weight")


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_pairs_of_our_layers_are_what_merging_adds(kind: str) -> None:
    model = KIND_MODELS[kind].plain()
    apply_lora(model, r=4, lora_alpha=6, **KIND_MODELS[kind].rules)
    with_values(model)
    found = pairs(model)
    assert what(found) == EXPECTED[kind]
    assert all(pair.adapter == "" and pair.layer is model.get_submodule(pair.name) for pair in found)
    for pair in found:
        weight = weight_of(pair.layer, pair.part).detach()
        change = weight_of(pair.layer.to_plain(), pair.part).detach().double() - weight.double()
        torch.testing.assert_close(change, as_stored(delta(pair), pair, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", EXPECTED)
def test_the_pairs_of_pefts_layers_are_its_delta_weights(kind: str, fused: bool) -> None:
    case = KIND_MODELS[kind]
    rules = {"target_modules": []} | dict(case.rules) | dict(case.peft)
    model = with_values(peft.get_peft_model(case.plain(), peft.LoraConfig(r=4, lora_alpha=6, **rules)))
    if fused:
        lora_kernels.fuse(model)
    found = pairs(model)
    short = [(pair.name.removeprefix("base_model.model.").partition(".base_layer")[0], pair.kind) for pair in found]
    if kind == "attention":  # PEFT's layer in the place of out_proj is a linear layer
        assert short == [("attn", ATTENTION), ("attn", LINEAR)]
    else:
        assert sorted(short) == sorted((name, of) for name, of, _ in EXPECTED[kind])
    for pair in found:
        assert pair.adapter == "default" and pair.layer is model.get_submodule(pair.name)
        want = pair.layer.get_delta_weight("default").double()
        count = counted().value if pair.name.endswith("out_proj") else 1  # PEFT merges this update twice
        torch.testing.assert_close(as_stored(delta(pair), pair, want), count * want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_and_dora_layers_have_their_parameters(kind: str) -> None:
    layer = FusedLoRALinear.from_linear(nn.Linear(64, 32), r=4, lora_alpha=6, **KINDS[kind])
    (pair,) = pairs(nn.Sequential(layer))
    assert what([pair]) == [("0", LINEAR, "")]
    assert pair.a is layer.lora_A and pair.b is layer.lora_B and pair.scale == 1.5
    assert pair.magnitude is (layer.lora_magnitude_vector if kind == "dora" else None)


def test_the_matrix_that_starts_at_zero_is_named() -> None:
    model = KIND_MODELS["embedding"].plain()
    apply_lora(model, r=4, **KIND_MODELS["embedding"].rules)
    theirs = peft.get_peft_model(KIND_MODELS["embedding"].plain(), peft.LoraConfig(target_modules=["0", "3"]))
    for pair in pairs(model) + pairs(theirs):
        assert not pair.zero_at_start.count_nonzero() and pair.random_at_start.count_nonzero()
        assert {id(pair.zero_at_start), id(pair.random_at_start)} == {id(pair.a), id(pair.b)}


@pytest.mark.parametrize("grouped", [False, True])
def test_the_groups_of_a_convolution_are_stacked(grouped: bool) -> None:
    conv = nn.Conv2d(8, 6, 3, groups=2, dtype=torch.float64)
    layer = with_values(lora_kernels.FusedLoRAConv2d.from_conv(conv, r=4, lora_alpha=6, grouped=grouped))
    (pair,) = pairs(layer)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    channels = 4 if grouped else 8
    kernels = delta(pair).reshape(6, channels, 3, 3)
    with torch.no_grad():
        if grouped:
            want = nn.functional.conv2d(x, kernels, groups=2)
        else:
            want = nn.functional.conv2d(x, kernels)
        torch.testing.assert_close(layer(x) - conv(x), want)


def test_several_adapters_each_have_their_pair_and_one_can_be_chosen() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"], r=2))
    model.add_adapter("second", peft.LoraConfig(target_modules=["0"], r=3, use_dora=True))
    assert [(pair.adapter, pair.a.shape[0]) for pair in pairs(model)] == [("default", 2), ("second", 3)]
    (pair,) = pairs(model, "second")
    assert pair.magnitude is pair.layer.lora_magnitude_vector["second"].weight
    with pytest.raises(KeyError, match="no adapter is called 'third'; the model has default, second"):
        pairs(model, "third")


def test_the_scale_is_the_one_of_now() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"], r=2))
    model.base_model.model[0].scaling["default"] = torch.tensor(0.25)  # as after prepare_model_for_compiled_hotswap
    (pair,) = pairs(model)
    assert pair.scale == 0.25 and isinstance(pair.scale, float)


def test_a_tied_head_has_no_pair_of_its_own() -> None:
    plain, rules = tied_llama(), TIED
    ours, theirs = copy.deepcopy(plain), peft.get_peft_model(plain, peft.LoraConfig(**rules))
    apply_lora(ours, **rules)
    for model in (ours, theirs):
        names = [pair.name.removeprefix("base_model.model.") for pair in pairs(model)]
        assert names == ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]


def test_wrappers_leave_the_names_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    apply_lora(model, r=2, target_modules=["0"])
    want = what(pairs(model))
    assert [name for name, _, _ in want] == ["0", "1.0"]
    assert what(pairs(torch.compile(model))) == want
    assert what(pairs(torch.optim.swa_utils.AveragedModel(model))) == want


def test_a_layer_that_occurs_twice_is_found_once() -> None:
    layer = FusedLoRALinear.from_linear(nn.Linear(4, 4), r=2)
    assert [pair.name for pair in pairs(nn.Sequential(layer, layer))] == ["0"]


def test_other_methods_of_peft_are_left_out() -> None:
    for config in (peft.LoHaConfig(target_modules=["0"]), peft.AdaLoraConfig(target_modules=["0"], total_step=9)):
        assert pairs(peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)) == []


def test_an_update_that_is_no_product_of_a_and_b_is_refused() -> None:
    blocks = peft.tuners.lora.config.BdLoraConfig(target_modules_bd_a=["0"], target_modules_bd_b=[], nblocks=2)
    config = peft.LoraConfig(target_modules=["0"], r=2, use_bdlora=blocks)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    with pytest.raises(
        ValueError, match=r"'default' of base_model\.model\.0 is PEFT's BdLoraLinearVariant, whose update"
    ):
        pairs(model)


def test_a_parametrised_or_pruned_matrix_is_refused() -> None:
    for change in (
        lambda layer: nn.utils.parametrizations.weight_norm(layer, "lora_A"),
        lambda layer: prune.random_unstructured(layer, "lora_A", 0.5),
    ):
        layer = FusedLoRALinear.from_linear(nn.Linear(4, 4), r=2)
        change(layer)
        with pytest.raises(ValueError, match=r"lora_A of 0, a .*LoRALinear, is no parameter of the layer"):
            pairs(nn.Sequential(layer))


@pytest.mark.parametrize("whose", ["ours", "PEFT"])
def test_adapters_of_another_method_are_named_where_no_pair_is_found(whose: str) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    if whose == "ours":
        lora_kernels.apply_vera(model, r=3)
    else:
        model = peft.get_peft_model(model, peft.VeraConfig(r=3, target_modules=["0", "1"]))
    for call in (
        lambda: train.loraplus_groups(model, 1e-3, 16.0),
        lambda: train.freeze_a(model),
        lambda: train.restart(model),
        lambda: analysis.analyse(model),
    ):
        with pytest.raises(ValueError, match=r"0.*1 \(a \w+, (which has no A|whose update is not)"):
            call()


@pytest.mark.parametrize("call", [pairs, train.freeze_a, train.restart, lambda m: train.loraplus_groups(m, 1e-3, 16.0)])
def test_what_is_no_module_is_refused_by_its_type(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module with adapters, got a list"):
        call([nn.Linear(2, 2)])
