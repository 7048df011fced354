"""With ``init=`` a module splits W into a new base and an adapter. The adapter is not saved without its base."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear, apply_lora, merge_and_unload, save_adapter
from lora_kernels.quant.weight import quantize_weight


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(64, 48, dtype=dtype)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"adapter_dtype": torch.float32}])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_dense_split_computes_what_the_linear_does(init, settings):
    dtype = torch.bfloat16 if "adapter_dtype" in settings else torch.float32
    base, x = linear(dtype), torch.randn(5, 64, dtype=dtype)
    before = base.weight.detach().clone()
    layer = FusedLoRALinear.from_linear(base, r=4, init=init, **settings)
    assert torch.equal(base.weight, before) and not torch.equal(layer.weight, before)
    assert not layer.weight.requires_grad and layer.lora_B.abs().max() > 0 and layer.lora_B.requires_grad
    tolerance = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(layer(x), base(x), **tolerance)
    torch.testing.assert_close(layer.to_linear().weight, before, **tolerance)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("init", ["loftq", "lq_lora"])
def test_a_quantised_split_is_nearer_to_the_linear_than_quantising_alone(init, quant):
    base = linear()
    layer = FusedLoRALinear.from_linear(base, r=8, quant=quant, double_quant=quant == "nf4", init=init)
    merged = layer.to_linear().weight
    alone = quantize_weight(base.weight, quant, double_quant=quant == "nf4").dequantize()
    assert (merged - base.weight).norm() < 0.95 * (alone - base.weight).norm()
    assert layer.quantized_weight().format == quant


def test_a_model_computes_the_same_after_apply_lora_and_after_merging():
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))
    x = torch.randn(6, 32)
    want = model(x)
    twin = copy.deepcopy(model)
    apply_lora(twin, r=4, init="pissa", target_modules=["0", "2"])
    torch.testing.assert_close(twin(x), want)
    torch.testing.assert_close(merge_and_unload(twin)(x), want)


def test_an_adapter_without_its_base_is_not_saved(tmp_path):
    model = nn.Sequential(nn.Linear(32, 24))
    apply_lora(model, r=4, init="olora", target_modules=["0"])
    with pytest.raises(ValueError, match=r"0 \(init='olora'\).*state_dict of the whole model, or merge_and_unload"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_copy_and_a_state_dict_keep_the_split():
    layer = FusedLoRALinear.from_linear(linear(), r=4, init="pissa")
    assert copy.deepcopy(layer).init == "pissa"
    other = FusedLoRALinear.from_linear(linear(), r=4)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "svd"}, "unknown init 'svd': one of 'kaiming', 'gaussian', .*'pissa', 'milora', 'olora', 'loftq'"),
        ({"init": "loftq"}, "give quant="),
        ({"init": "pissa", "quant": "nf4"}, "for a dense base, and quant='nf4': take 'loftq' or 'lq_lora'"),
        ({"init": "pissa", "r": 49}, "49"),
    ],
)
def test_an_init_that_cannot_be_is_refused_and_freezes_nothing(settings, message):
    base = linear()
    with pytest.raises(ValueError, match=message):
        FusedLoRALinear.from_linear(base, **({"r": 4} | settings))
    assert base.weight.requires_grad
