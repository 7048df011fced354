"""`apply_lora` adapts no layer that its parent reads past the adapter, and `verify` finds those that it cannot see."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from support.inject_models import llama, plain, transformers
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.models.inject import apply_lora

X = torch.randn(5, 8)


class Attention(nn.Module):
    """q is called, k is called or read, v is read by a method, and o from outside."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.fused = fused

    def forward(self, x):
        k = F.linear(x, self.k.weight, self.k.bias) if self.fused else self.k(x)
        return self.q(x) + k + self.values(x)

    def values(self, x):
        return F.linear(x, self.v.weight)


class Outside(nn.Module):
    """A model that reads the o of its attention by a way that the source does not show."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.attention = Attention(fused)

    def forward(self, x):
        attention = self.attention
        return F.linear(attention(x), attention.o.weight)


def quietly(model, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return apply_lora(model, **settings)


def test_all_linear_leaves_a_layer_that_is_read_and_warns():
    model = Outside()
    with pytest.warns(UserWarning, match=r"got no adapter: attention\.v \(Attention\.values reads its weight"):
        report = apply_lora(model)
    assert type(model.attention.v) is nn.Linear
    assert [layer.name for layer in report.layers] == ["attention.q", "attention.k", "attention.o"]
    assert "Attention.values reads its weight" in report.passed_over["attention.v"]


def test_naming_a_layer_that_is_read_is_an_error():
    model = Outside()
    with pytest.raises(ValueError, match=r"attention\.v \(Attention\.values reads its weight.*exclude_modules"):
        apply_lora(model, target_modules=["q", "v"])
    assert type(model.attention.q) is nn.Linear and model.attention.q.weight.requires_grad


def test_a_layer_that_may_be_read_is_in_doubt_until_verify_looks():
    with pytest.warns(UserWarning, match=r"not certain, and verify=inputs finds out: attention\.k"):
        report = apply_lora(model := Outside(), target_modules=["q", "k"])
    assert list(report.doubted) == ["attention.k"] and "in doubt, Attention.forward may read" in str(report)
    after = report.verify(model, X)
    assert not after.doubted and not after.without_effect and "in doubt" not in str(after)
    assert not quietly(Outside(), target_modules=["q", "k"], verify=X).doubted


def test_verify_names_the_adapters_without_effect():
    with pytest.warns(UserWarning, match=r"take no part in the forward: attention\.k, attention\.o"):
        report = apply_lora(Outside(fused=True), target_modules=["q", "k", "o"], verify={"x": X})
    reason = "in training mode other code read its weight, past its adapter"
    assert report.without_effect == {"attention.k": reason, "attention.o": reason}
    assert f"without effect, {reason}: attention.k, attention.o" in str(report)


def test_what_verify_says_is_what_the_gradients_say():
    model = Outside(fused=True)
    with pytest.warns(UserWarning):
        report = apply_lora(model, target_modules=["q", "k", "o"], verify=X)
    model(X).sum().backward()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FusedLoRALinear)}
    assert {name for name, layer in layers.items() if layer.lora_B.grad is None} == set(report.without_effect)


@pytest.mark.parametrize("encoder", [False, True])
def test_a_forward_that_fails_leaves_the_model_as_it_was(encoder):
    model = plain()
    if encoder:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    modules, trained = [*model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises((AssertionError, ValueError)):
        apply_lora(model, verify=torch.randn(2, 3, 5))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not encoder or model.layers[0].activation_relu_or_gelu == 1


@pytest.mark.parametrize("settings", [{}, {"verify": X}], ids=["", "verify"])
def test_a_warning_that_is_an_error_leaves_the_model_as_it_was(settings):
    model = Outside(fused=True)
    layers, trained = dict(model.named_modules()), {name: p.requires_grad for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"got no adapter|take no part"):
            apply_lora(model, **settings)
    assert dict(model.named_modules()) == layers
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained


def test_dummy_inputs_serve_where_a_model_has_them():
    assert quietly(llama(), verify=True).without_effect == {}
    model = llama()
    report = quietly(model, target_modules=["lm_head", "q_proj"], verify=True)
    assert report.verify(model).without_effect == {}
    head = report.verify(model.model, input_ids=torch.arange(4)[None])
    assert head.without_effect == {}  # the body alone has no head that could be passed over


def test_dummy_inputs_that_do_not_fit_are_an_error_with_the_way_out():
    with pytest.raises(ValueError, match="no dummy_inputs: give inputs"):
        apply_lora(plain(), verify=True)
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
        )
    )
    with pytest.raises(ValueError, match=r"own dummy_inputs \((AttributeError|ValueError).*verify=batch"):
        apply_lora(vit, verify=True)
    assert type(next(m for m in vit.modules() if isinstance(m, nn.Linear))) is nn.Linear
    assert quietly(vit, verify={"pixel_values": torch.randn(1, 3, 8, 8)}).layers


def test_a_merged_layer_is_not_judged():
    model = plain()
    report = quietly(model, target_modules=["q_proj", "first"])
    model.first.merge()
    assert report.verify(model, torch.randn(2, 6)).without_effect == {}
