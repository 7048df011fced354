"""`FusedLoRALinear` takes the place of nn.Linear: values, merging, state_dict, copies and conversions."""

from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.replicas import replica
from torch import nn

from lora_kernels import FusedLoRALinear


def trained(*args, **kwargs) -> FusedLoRALinear:
    """Return a module whose adapter is not zero."""
    layer = FusedLoRALinear(*args, **kwargs)
    nn.init.normal_(layer.lora_B)
    return layer


def test_a_fresh_module_computes_its_base():
    layer, x = FusedLoRALinear(8, 5, r=3), torch.randn(4, 8)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.lora_B.count_nonzero() == 0
    bound = 1 / math.sqrt(8)  # the bound of Kaiming-uniform(√5) for a fan-in of 8
    assert 0 < layer.lora_A.abs().max() <= bound


def test_only_the_adapter_trains():
    layer = FusedLoRALinear(8, 5, r=3)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert FusedLoRALinear(8, 5, bias=False).bias is None


@pytest.mark.parametrize(("rslora", "want"), [(False, 16 / 4), (True, 16 / 2)])
def test_scaling_is_alpha_over_r_or_its_root_and_may_change(rslora, want):
    layer, x = trained(8, 5, r=4, lora_alpha=16, use_rslora=rslora), torch.randn(3, 8)
    assert layer.scaling == want
    low = x @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + want * low)
    layer.scaling = 0.0
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_dropout_acts_only_while_training():
    layer, x = trained(64, 8, r=4, lora_dropout=0.5), torch.randn(4, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and not layer.merged


def test_from_linear_shares_and_freezes_weight_and_bias():
    base = nn.Linear(6, 5, dtype=torch.bfloat16).eval()
    layer = FusedLoRALinear.from_linear(base, r=2, adapter_dtype=torch.float32)
    assert layer.weight is base.weight and layer.bias is base.bias and not base.weight.requires_grad
    assert layer.lora_A.dtype == torch.float32 and not layer.training
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    # a back-end may add the bias after rounding x Wᵀ, which is one more rounding of terms of about 1
    torch.testing.assert_close(layer(x), base(x), atol=2**-8, rtol=2**-8)


def test_a_linear_without_bias_stays_without():
    base, x = nn.Linear(6, 5, bias=False), torch.randn(3, 6)
    layer = FusedLoRALinear.from_linear(base, r=2)
    assert layer.bias is None
    torch.testing.assert_close(layer(x), base(x))
    assert set(layer.state_dict()) == {"weight", "lora_A", "lora_B"} and layer.to_linear().bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_rounds_once_and_unmerge_restores_every_bit(dtype):
    layer, x = trained(700, 600, r=4, dtype=dtype), torch.randn(3, 700, dtype=dtype)
    before, y = layer.weight.clone(), layer(x)
    exact = before.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    layer.merge()
    assert layer.merged and torch.equal(layer.weight, exact.to(dtype))
    y_merged = layer(x)
    torch.testing.assert_close(y_merged, y, rtol=0.05, atol=0.5 if dtype != torch.float32 else 1e-3)
    layer.merge()  # the second call does nothing
    assert torch.equal(layer.weight, exact.to(dtype))
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, before) and torch.equal(layer(x), y)
    layer.unmerge()


def test_training_a_merged_module_warns():
    layer = trained(4, 4)
    layer.merge()
    with pytest.warns(UserWarning, match="unmerge"):
        layer(torch.randn(2, 4))
    layer.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(2, 4))


def test_to_linear_gives_a_plain_layer_of_its_own_memory():
    layer, x = trained(8, 5, r=2), torch.randn(3, 8)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and linear.weight.data_ptr() != layer.weight.data_ptr()
    torch.testing.assert_close(linear(x), layer(x))
    layer.merge()
    assert torch.equal(layer.to_linear().weight, linear.weight)
    linear.weight.data.zero_()
    assert layer.weight.count_nonzero() > 0


def test_reset_adapter_unmerges_and_makes_b_zero():
    layer = trained(8, 5, r=2)
    before = layer.weight.clone()
    layer.merge()
    layer.reset_adapter()
    assert not layer.merged and layer.lora_B.count_nonzero() == 0 and torch.equal(layer.weight, before)


# --- state_dict ---


def test_a_linears_state_dict_is_loaded_and_the_adapter_stays():
    base, model = nn.Linear(6, 5), nn.Sequential(trained(6, 5, r=2))
    adapter = model[0].lora_B.clone()
    model.load_state_dict({f"0.{key}": value for key, value in base.state_dict().items()})  # the load is strict
    assert torch.equal(model[0].weight, base.weight) and torch.equal(model[0].lora_B, adapter)


def test_half_an_adapter_in_a_state_dict_is_an_error():
    source, target = trained(6, 5, r=2).state_dict(), FusedLoRALinear(6, 5, r=2)
    del source["lora_B"]
    with pytest.raises(RuntimeError, match="lora_B"):
        target.load_state_dict(source)


def test_a_state_dict_gives_the_same_layer_and_has_four_keys():
    layer, other = trained(6, 5, r=2), FusedLoRALinear(6, 5, r=2)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), other(x))


def test_a_merged_modules_state_dict_is_that_of_the_unmerged_one():
    layer, other, x = trained(6, 5, r=2), trained(6, 5, r=2), torch.randn(3, 6)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.merge()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    other.merge()
    other.load_state_dict(layer.state_dict())  # the loaded adapter is merged into the loaded weight
    assert other.merged
    torch.testing.assert_close(other(x), layer(x))
    other.unmerge()
    assert torch.equal(other.weight, before["weight"])


@pytest.mark.parametrize("merged", [False, True])
def test_a_deepcopy_and_an_unpickled_module_compute_the_same(merged):
    layer, x = trained(6, 5, r=2, lora_dropout=0.1).eval(), torch.randn(3, 6)
    if merged:
        layer.merge()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert other.merged == merged and torch.equal(other(x), layer(x))
        other.unmerge()
        assert other.weight.data_ptr() != layer.weight.data_ptr()


def test_conversions_of_dtype_convert_the_kept_base_too():
    layer = trained(6, 5, r=2)
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer.half()(torch.randn(2, 6).half()).dtype == torch.float16
    assert layer.double()(torch.randn(2, 6).double()).dtype == torch.float64


def test_a_layer_from_the_meta_device_can_be_filled():
    layer = FusedLoRALinear(6, 5, r=2, device="meta")
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(2, 6))).all()


def test_repr_shows_the_settings():
    text = repr(
        FusedLoRALinear(6, 5, r=2, lora_dropout=0.1, dtype=torch.bfloat16, adapter_dtype=torch.float32, backend="eager")
    )
    for part in ("in_features=6", "r=2", "scaling=8", "lora_dropout=0.1", "float32", "eager"):
        assert part in text


def test_a_layer_learns_an_update_of_its_rank():
    """Update and module have rank 2, so gradient descent finds the update."""
    torch.manual_seed(1)
    layer = FusedLoRALinear(12, 10, r=2, lora_alpha=2)
    x = torch.randn(256, 12)
    update = torch.randn(10, 2) @ torch.randn(2, 12) * 0.3
    target = F.linear(x, layer.weight + update, layer.bias).detach()
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.03)
    first = None
    for _ in range(300):
        loss = F.mse_loss(layer(x), target)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3 * first


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_replica_of_data_parallel_computes_and_trains_the_same(quant, bias):
    layer = FusedLoRALinear.from_linear(nn.Linear(64, 5, bias=bias), r=3, quant=quant)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 64)
    y = layer(x)
    y.sum().backward()
    want, layer.lora_A.grad = layer.lora_A.grad, None
    again = replica(layer)(x)
    again.sum().backward()
    assert torch.equal(again, y) and torch.equal(layer.lora_A.grad, want)
