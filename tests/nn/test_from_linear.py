"""`from_linear` refuses layers that are more than weight and bias. Parametrised and pruned modules compute right
values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from lora_kernels import FusedLoRALinear, QuantizedLoRALinear, quantize_weight


class Twice(nn.Module):
    def forward(self, t):
        return 2 * t


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(register: str) -> nn.Linear:
    linear = nn.Linear(6, 5)
    getattr(linear, register)(lambda *_: None)
    return linear


def parametrised() -> nn.Linear:
    linear = nn.Linear(6, 5)
    parametrize.register_parametrization(linear, "weight", Twice())
    return linear


def patched() -> nn.Linear:
    linear = nn.Linear(6, 5)
    linear.forward = lambda x: x
    return linear


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedLoRALinear(6, 5), "FusedLoRALinear has an adapter, which would be lost: merge it first"),
        (lambda: FusedLoRALinear.from_linear(nn.Linear(6, 5), quant="int8"), "QuantizedLoRALinear has an adapter"),
        (lambda: Doubling(6, 5), "a Doubling with a forward of its own"),
        (lambda: nn.Conv1d(6, 5, 1), "must be an nn.Linear, and is a Conv1d"),
        (lambda: hooked("register_forward_hook"), "has hooks, which would be lost"),
        (lambda: hooked("register_full_backward_hook"), "has hooks, which would be lost"),
        (patched, "has hooks, which would be lost"),
        (parametrised, r"parametrised or pruned.*remove_parametrizations"),
        (lambda: prune.l1_unstructured(nn.Linear(6, 5), "weight", 3), r"parametrised or pruned.*prune.remove"),
        (lambda: nn.LazyLinear(5), "LazyLinear does not know its size yet"),
    ],
)
def test_a_layer_that_is_more_than_weight_and_bias_is_refused(make, message, quant):
    with pytest.raises(TypeError, match=message):
        FusedLoRALinear.from_linear(make(), r=2, quant=quant)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", ["weight", "bias", "lora_A", "lora_B", "lora_magnitude_vector"])
def test_a_parametrised_parameter_is_used_and_trained(name, use_dora):
    if name == "lora_magnitude_vector" and not use_dora:
        pytest.skip("a parameter of DoRA")
    layer, x = FusedLoRALinear(6, 5, r=2, use_dora=use_dora), torch.randn(3, 6)
    nn.init.normal_(layer.lora_B)
    twice = FusedLoRALinear(6, 5, r=2, use_dora=use_dora)
    twice.load_state_dict(layer.state_dict())
    with torch.no_grad():
        getattr(twice, name).mul_(2)
    parametrize.register_parametrization(layer, name, Twice())
    torch.testing.assert_close(layer(x), twice(x))
    layer(x).sum().backward()
    twice(x).sum().backward()
    for own, p in twice.named_parameters():
        if p.grad is not None:
            factor = 2 if own == name else 1
            q = layer.parametrizations[name].original if own == name else getattr(layer, own)
            torch.testing.assert_close(q.grad, factor * p.grad)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_a_pruned_parameter_is_used_and_trained(name):
    layer, x = FusedLoRALinear(6, 5, r=2), torch.randn(3, 6)
    nn.init.normal_(layer.lora_B)
    prune.l1_unstructured(layer, name, 0.5)
    assert 0 < getattr(layer, f"{name}_mask").sum() < getattr(layer, name).numel()
    low = x @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + layer.scaling * low)
    layer(x).sum().backward()
    if name != "weight":
        pruned = getattr(layer, f"{name}_mask") == 0
        assert getattr(layer, f"{name}_orig").grad[pruned].count_nonzero() == 0


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init": "pissa"}, {"quant": "nf4"}, {"quant": "int8"}])
def test_a_layer_that_is_made_in_inference_mode_can_train(settings):
    linear, x = nn.Linear(8, 8), torch.randn(3, 8)
    with torch.inference_mode():
        layer = FusedLoRALinear.from_linear(linear, r=2, **settings)
        layer(x)
    layer(x).sum().backward()
    assert layer.lora_B.grad is not None and not layer.lora_B.is_inference()


def test_a_layer_over_a_quantised_weight_that_is_made_in_inference_mode_can_train():
    weight, x = quantize_weight(torch.randn(8, 8), "nf4"), torch.randn(3, 8)
    with torch.inference_mode():
        layer = QuantizedLoRALinear.over(weight, r=2)
    layer(x).sum().backward()
    assert layer.lora_B.grad is not None
