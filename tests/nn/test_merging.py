"""Merging leaves nothing half-done: ties, weights that are computed, inference mode, replaced weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import nn
from torch.nn.utils import prune

from lora_kernels import FusedLoRALinear, merge_and_unload


def trained(**settings) -> FusedLoRALinear:
    layer = FusedLoRALinear.from_linear(nn.Linear(64, 32), r=4, **settings)
    nn.init.normal_(layer.lora_B)
    return layer


def lossy(quant: str | None) -> dict[str, bool]:
    return {} if quant is None else {"lossy": True}


class Half(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w * 0.5


def parametrised(layer: FusedLoRALinear) -> None:
    parametrize.register_parametrization(layer, "weight", Half())


def pruned(layer: FusedLoRALinear) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("change", [parametrised, pruned])
def test_a_computed_weight_is_not_merged_and_the_layer_is_as_before(change, use_dora):
    layer, x = trained(use_dora=use_dora).eval(), torch.randn(3, 64)
    change(layer)
    want = layer(x)
    with pytest.raises(ValueError, match=r"parametrised, pruned.*to_linear"):
        layer.merge()
    assert not layer.merged and torch.equal(layer(x), want)
    layer.unmerge()
    torch.testing.assert_close(layer.to_linear()(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [parametrised, pruned])
def test_a_weight_that_is_computed_since_the_merge_is_not_unmerged(change):
    layer, x = trained().eval(), torch.randn(3, 64)
    layer.merge()
    change(layer)
    want = layer(x)
    with pytest.raises(ValueError, match="parametrised, pruned"):
        layer.unmerge()
    assert layer.merged and torch.equal(layer(x), want)


@pytest.mark.parametrize("quant", [None, "nf4", "fp8"])
def test_an_adapter_that_overflows_leaves_the_layer_unmerged(quant):
    layer = trained(quant=quant)
    with torch.no_grad():
        layer.lora_B[3, 1] = torch.inf
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(**lossy(quant))
    assert not layer.merged and all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"embed": nn.Embedding(32, 64), "head": trained()})
    model.head.weight = model.embed.weight
    return model.requires_grad_(False)


@pytest.mark.parametrize("move", [None, torch.bfloat16, torch.float64, "copy"])
def test_a_tied_weight_is_w_for_the_others_while_merged_and_tied_again_after(move):
    model, ids = tied(), torch.arange(32)
    w = model.embed.weight.clone()
    model.head.merge()
    assert torch.equal(model.embed(ids), w) and not torch.equal(model.head.weight, w)
    if move == "copy":
        model = copy.deepcopy(model)
    elif move is not None:
        model.to(move)
        w = w.to(move)
    model.head.unmerge()
    assert model.head.weight is model.embed.weight and torch.equal(model.embed.weight, w)
    assert {"head.weight", "embed.weight"} <= set(model.state_dict())


def test_a_merged_layer_is_given_no_other_weight():
    """transformers' tie_weights() would drop the merged update without a word."""
    model = tied()
    model.head.merge()
    merged = model.head.weight
    with pytest.raises(ValueError, match=r"merged: unmerge\(\) it before"):
        model.head.weight = model.embed.weight
    assert model.head.weight is merged
    model.head.unmerge()
    model.head.weight = nn.Parameter(torch.randn(32, 64), requires_grad=False)


@pytest.mark.parametrize("quant", [None, "nf4", "int8", "fp8"])
def test_what_is_merged_in_inference_mode_can_train_afterwards(quant):
    layer, x = trained(quant=quant), torch.randn(3, 64)
    y = layer(x)
    with torch.inference_mode():
        layer.merge(**lossy(quant))
        layer(x)
        assert not any(p.is_inference() for p in layer.parameters())
        layer.unmerge()
        dense = layer.to_linear()
    assert not any(t.is_inference() for t in (*layer.state_dict().values(), *dense.parameters()))
    assert torch.equal(layer(x), y)
    layer(x).sum().backward()
    dense(x).sum().backward()
    assert layer.lora_A.grad is not None and dense.weight.grad is not None


def test_a_model_that_is_unloaded_in_inference_mode_can_train_afterwards():
    model, x = nn.Sequential(trained()), torch.randn(3, 64)
    with torch.inference_mode():
        merge_and_unload(model)
    model.requires_grad_()(x).sum().backward()
    assert model[0].weight.grad is not None


def test_layers_that_share_their_codes_share_them_again_after_a_merge():
    one, other = trained(quant="nf4"), trained(quant="nf4")
    other.weight = one.weight
    one.merge(lossy=True)
    assert one.weight is not other.weight
    one.unmerge()
    assert one.weight is other.weight
