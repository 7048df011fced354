"""PEFT's layers on the fused path give what PEFT gives: values, gradients, dtypes, masks."""

from __future__ import annotations

import copy

import pytest
import torch
from support.replicas import replica

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from support.peft_models import (  # noqa: E402
    Conv1DNet,
    config,
    fused_equals_peft,
    fused_layers,
    make,
    randomise,
    run,
    same,
    with_our_masks,
)

import lora_kernels  # noqa: E402


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down": 9}, "alpha_pattern": {"up": 1}},
        {"bias": "all"},
        {"modules_to_save": ["head"]},
        {"target_modules": ["up"], "lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"use_dora": True},
    ],
    ids=str,
)
def test_values_and_gradients_are_pefts(kwargs):
    fused_equals_peft(make(**kwargs).train(), torch.randn(2, 5, 24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", ["fp32", "same"])
def test_sixteen_bit_bases_give_pefts_values(dtype, adapters):
    model = make(dtype)
    if adapters == "same":
        model.to(dtype)
    assert fused_layers(model) == [] and next(p for n, p in model.named_parameters() if "lora_A" in n).dtype == (
        dtype if adapters == "same" else torch.float32
    )
    fused_equals_peft(model, torch.randn(6, 24, dtype=dtype), rtol=4 * torch.finfo(dtype).eps)


def test_dropout_is_pefts_with_our_mask(monkeypatch):
    model, x = make(lora_dropout=0.3).train(), torch.randn(3, 7, 24)
    plain, seeds = with_our_masks(model, 0.3, monkeypatch)
    want = run(plain, x)
    lora_kernels.fuse(model, strict=True)
    same(run(model, x), want)
    assert next(seeds) == 102
    model.eval()
    same(run(model, x), run(plain.eval(), x))
    assert next(seeds) == 103, "no seed is drawn where nothing is dropped"


def test_dora_with_dropout_is_pefts_with_our_mask(monkeypatch):
    model, x = make(use_dora=True, lora_dropout=0.3).train(), torch.randn(3, 7, 24)
    plain, _ = with_our_masks(model, 0.3, monkeypatch)
    want = run(plain, x)
    assert lora_kernels.fuse(model, strict=True).fused
    same(run(model, x), want, rtol=1e-5)
    model.eval().merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), plain.eval()(x))
    assert all(layer.fused_calls == 2 for layer in fused_layers(model))


def test_scaling_may_be_a_tensor_or_change():
    model, x = make(), torch.randn(4, 24)
    lora_kernels.fuse(model)
    for scaling in (torch.tensor(0.7), 0.2, torch.tensor([1.5])):
        for layer in fused_layers(model):
            layer.scaling["default"] = scaling
        plain = copy.deepcopy(model)
        lora_kernels.unfuse(plain)
        same(run(model, x), run(plain, x))
    assert all(layer.fused_calls == 3 for layer in fused_layers(model))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_several_active_adapters_give_pefts_sum(p, monkeypatch):
    """Without dropout they run as one adapter. With dropout each has a mask of its own."""
    model = make(lora_bias=True, target_modules=["up"], lora_dropout=p)
    model.add_adapter("second", config(r=7, target_modules=["up"], lora_dropout=p))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])
    model.train(p == 0)
    fused_equals_peft(model, torch.randn(5, 24))
    model.train()
    calls = []
    original = lora_kernels.peft.fused.lora_linear
    monkeypatch.setattr("lora_kernels.peft.fused.lora_linear", lambda *a, **k: calls.append(k) or original(*a, **k))
    model(torch.randn(5, 24))
    assert [call["dropout_p"] for call in calls] == [p]


def test_adapters_by_sample_give_pefts_values():
    model = make(lora_dropout=0.1)
    model.add_adapter("second", config(r=2))
    randomise(model)
    names = ["second", "__base__", "default", "second", "__base__"]
    fused_equals_peft(model.eval(), torch.randn(5, 3, 24), adapter_names=names)
    with pytest.raises(ValueError, match="adapter_names"):
        model(torch.randn(4, 3, 24), adapter_names=names)


def test_a_conv1d_gives_pefts_values():
    pytest.importorskip("transformers")
    fused_equals_peft(make(net=Conv1DNet, fan_in_fan_out=True), torch.randn(5, 24))


def test_autocast_gives_pefts_values_in_16_bits():
    """Under autocast, PEFT and the fused layer compute base and adapter in 16 bits. fp32 adapters stay fp32."""
    model, x = make().train(), torch.randn(8, 24)
    with torch.autocast("cpu", torch.bfloat16):
        want = run(model, x)
        lora_kernels.fuse(model)
        got = run(model, x)
    same(got, want, rtol=0.02)
    assert all(layer.fused_calls == 1 for layer in fused_layers(model))


def test_replicas_of_data_parallel_take_the_fused_path():
    model = make()
    lora_kernels.fuse(model, strict=True)
    layer = fused_layers(model)[0]
    x = torch.randn(4, layer.in_features)
    y = layer(x)
    y.sum().backward()
    wanted, layer.lora_A["default"].weight.grad = layer.lora_A["default"].weight.grad, None
    other = replica(layer)
    assert not isinstance(other.read(x), str)
    again = other(x)
    again.sum().backward()
    assert torch.equal(again, y) and torch.equal(layer.lora_A["default"].weight.grad, wanted)


def test_an_adapter_that_is_active_twice_counts_twice_as_in_peft():
    model, x = make().eval(), torch.randn(4, 24)
    plain = copy.deepcopy(model)
    lora_kernels.fuse(model, strict=True)
    for each in (model, plain):
        for name in ("up", "down"):
            getattr(each.get_base_model(), name)._active_adapter = ["default", "default"]
    torch.testing.assert_close(model(x), plain(x))
    assert all(list(layer.passed_over) == ["an adapter that is active twice"] for layer in fused_layers(model))


def test_matrices_of_two_dtypes_are_left_to_peft():
    """PEFT raises for them, and under autocast computes."""
    model, x = make().eval(), torch.randn(4, 24)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.layer.Linear):
            module.lora_B.to(torch.bfloat16)
    plain = copy.deepcopy(model)
    lora_kernels.fuse(model)
    for each in (model, plain):
        with pytest.raises(RuntimeError, match="same dtype"):
            each(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), plain(x))
