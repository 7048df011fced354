"""After `apply_lora` the right parameters train, their number is right, and the model can become plain again."""

from __future__ import annotations

import pytest
import torch
from support.inject_models import plain, run
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.models.inject import (
    adapter_parameters,
    apply_lora,
    mark_only_lora_as_trainable,
    merge_and_unload,
    trainable_parameters,
)

# --- merging ---


def test_merge_and_unload_gives_a_plain_model_that_computes_the_same():
    model = plain().eval()
    apply_lora(model, target_modules=["q_proj", "mlp"])
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    want = run(model, "plain")
    assert merge_and_unload(model) is model
    assert not any(isinstance(m, FusedLoRALinear) for m in model.modules())
    assert type(model.blocks[0].q_proj) is nn.Linear and not model.blocks[0].q_proj.training
    assert trainable_parameters(model).trainable == 0
    torch.testing.assert_close(run(model, "plain"), want)
    apply_lora(model)  # the model is plain again
    with pytest.raises(ValueError, match="no layer with an adapter"):
        merge_and_unload(plain())


def test_dora_trains_its_magnitude_and_merges():
    model = plain().double().eval()
    apply_lora(model, target_modules=["q_proj", "mlp"], use_dora=True)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    assert names == {f"blocks.{i}.{n}.{part}" for i in range(3) for n in ("q_proj", "mlp") for part in parts}
    assert len(list(adapter_parameters(model))) == len(names)
    model.requires_grad_(False)
    model.blocks[0].mlp.lora_magnitude_vector.requires_grad_(True)
    mark_only_lora_as_trainable(model, "lora_only")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "blocks.0.mlp.lora_magnitude_vector",
        *(f"blocks.{i}.q_proj.bias" for i in range(3)),
    }
    for parameter in adapter_parameters(model):
        nn.init.uniform_(parameter, 0.5, 1.5)
    want = run(model, "plain")
    torch.testing.assert_close(run(merge_and_unload(model), "plain"), want)
    assert not any("lora_" in name for name in model.state_dict())


def test_merge_and_unload_of_a_layer_returns_a_linear():
    layer = FusedLoRALinear(3, 2)
    assert type(merge_and_unload(layer)) is nn.Linear


def test_a_merge_that_fails_changes_nothing():
    model = plain()
    apply_lora(model)
    with torch.no_grad():
        model.last.lora_B.fill_(float("inf"))
    layers = list(model.modules())
    with pytest.raises(ValueError, match=r"^last: merging"):
        merge_and_unload(model)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))


# --- what trains ---


def test_adapter_parameters_yields_a_and_b_of_every_layer():
    model = plain()
    apply_lora(model, target_modules=["q_proj"])
    names = {name for name, p in model.named_parameters() if any(p is q for q in adapter_parameters(model))}
    assert names == {f"blocks.{i}.q_proj.lora_{part}" for i in range(3) for part in "AB"}
    assert list(adapter_parameters(plain())) == []


@pytest.mark.parametrize(
    ("bias", "more"),
    [
        ("none", set()),
        ("lora_only", {f"blocks.{i}.q_proj.bias" for i in range(3)}),
        (
            "all",
            {"first.bias", "last.bias"}
            | {f"blocks.{i}.{n}.bias" for i in range(3) for n in ("q_proj", "v_proj", "norm")},
        ),
    ],
)
def test_mark_only_lora_trains_adapters_and_the_biases_asked_for(bias, more):
    model = plain()
    apply_lora(model, target_modules=["q_proj"])
    model.requires_grad_(True)
    model.blocks[0].q_proj.lora_A.requires_grad_(False)  # an adapter that was frozen on purpose stays frozen
    mark_only_lora_as_trainable(model, bias)
    adapters = {f"blocks.{i}.q_proj.lora_{part}" for i in range(3) for part in "AB"} - {"blocks.0.q_proj.lora_A"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters | more
    run(model, "plain").sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_mark_only_lora_refuses_an_unknown_bias_and_a_plain_model():
    model = plain()
    with pytest.raises(ValueError, match="apply_lora"):
        mark_only_lora_as_trainable(model)
    with pytest.raises(ValueError, match="lora_onyl"):
        mark_only_lora_as_trainable(model, "lora_onyl")
    assert all(p.requires_grad for p in model.parameters())


def test_trainable_parameters_counts_trained_and_all_elements():
    model = nn.Sequential(nn.Linear(100, 60), nn.Linear(60, 10, bias=False))
    model[1].weight = nn.Parameter(model[1].weight, requires_grad=False)
    summary = trainable_parameters(model)
    assert (summary.trainable, summary.total) == (6060, 6660)
    assert str(summary) == "trainable: 6,060 of 6,660 (90.99 %)"
    assert str(trainable_parameters(nn.ReLU())) == "trainable: 0 of 0 (0.00 %)"
