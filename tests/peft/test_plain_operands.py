"""The short reading of a fused PEFT layer serves the most frequent case, and nothing else.

That it gives the same operands as the whole reading is checked beside every test of this folder, see conftest.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from support.peft_models import Net, config, fused_layers, make  # noqa: E402

import lora_kernels  # noqa: E402

X = torch.randn(4, 24)


def fused(x: Tensor = X, **kwargs: Any) -> Any:
    """Return the fused layer `up` of a PEFT model in the dtype of `x`, after a first forward."""
    model = make(x.dtype, **kwargs)
    lora_kernels.fuse(model)
    layer = fused_layers(model)[0]
    layer(x)
    return layer


@pytest.mark.parametrize("kwargs", [{}, {"lora_dropout": 0.1}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_adapter_of_plain_lora_is_read_the_short_way(dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    """PEFT makes fp32 adapters beside a base in 16 bits."""
    x = X.to(dtype)
    layer = fused(x, **kwargs)
    w, a, b, scale, bias, p = layer.plain_operands(x)
    assert w is layer.base_layer.weight and bias is layer.base_layer.bias
    assert a is layer.lora_A["default"].weight and b is layer.lora_B["default"].weight
    assert scale == layer.scaling["default"] and p == kwargs.get("lora_dropout", 0.0)
    layer.eval()
    assert layer.plain_operands(x)[-1] == 0.0


@pytest.mark.parametrize("kwargs", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_dora_and_adapters_with_a_bias_are_read_as_a_whole(kwargs: dict[str, Any]) -> None:
    assert fused(**kwargs).plain_operands(X) is None


def test_two_active_adapters_are_read_as_a_whole() -> None:
    model = make()
    model.add_adapter("other", config(r=5))
    lora_kernels.fuse(model)
    layer = fused_layers(model)[0]
    assert layer.plain_operands(X) is not None
    model.base_model.set_adapter(["default", "other"])
    assert layer.plain_operands(X) is None


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a hook of the base": lambda layer: _hook(layer.base_layer),
    "a hook of A": lambda layer: _hook(layer.lora_A["default"]),
    "a hook of B": lambda layer: layer.lora_B["default"].register_full_backward_hook(lambda *_: None),
    "a hook of the dropout": lambda layer: layer.lora_dropout["default"].register_forward_pre_hook(lambda *_: None),
    "a forward of its own": lambda layer: setattr(layer.base_layer, "forward", lambda x: x),
    "disabled adapters": lambda layer: layer.enable_adapters(False),
    "a merged adapter": lambda layer: layer.merge(),
    "an adapter that is active twice": lambda layer: setattr(layer, "_active_adapter", ["default", "default"]),
    "another dtype of B": lambda layer: layer.lora_B.to(torch.bfloat16),
    "no active adapter": lambda layer: layer.set_adapter([]),
    "a trained base": lambda layer: layer.base_layer.weight.requires_grad_(),
    "another dtype of the base": lambda layer: layer.base_layer.to(torch.float64),
    "another dtype of A": lambda layer: layer.lora_A.to(torch.float64),
    "another dtype of the bias": lambda layer: setattr(
        layer.base_layer, "bias", nn.Parameter(layer.base_layer.bias.to(torch.bfloat16), requires_grad=False)
    ),
    "a dropout of everything": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(1.0)}),
    "a dropout of another kind": lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.1)}),
    "a base of another kind": lambda layer: setattr(layer, "base_layer", nn.Bilinear(24, 24, 40)),
    "a parametrised A": lambda layer: nn.utils.parametrizations.spectral_norm(layer.lora_A["default"]),
    "a tensor instead of A": lambda layer: layer.lora_A["default"]._parameters.update(weight=torch.randn(4, 24)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_has_changed_after_its_first_forward_is_read_as_a_whole(change: str) -> None:
    layer = fused()
    assert layer.plain_operands(X) is not None
    CHANGES[change](layer)
    assert layer.plain_operands(X) is None


def test_autocast_is_read_as_a_whole() -> None:
    layer = fused()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.plain_operands(X) is None
    assert layer.plain_operands(X) is not None
    assert layer.plain_operands(X.bfloat16()) is None


def test_an_input_of_a_dtype_without_kernels_is_read_as_a_whole() -> None:
    model = make(torch.float32, Net)
    lora_kernels.fuse(model)
    layer = fused_layers(model)[0].to(torch.complex64)
    assert layer.plain_operands(X.to(torch.complex64)) is None


def test_adapters_in_fp32_need_the_leave_to_convert_x() -> None:
    x = X.bfloat16()
    layer = fused(x)
    layer.cast_input_dtype_enabled = False
    assert layer.plain_operands(x) is None


def test_a_forward_with_arguments_is_read_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, short = fused(), []
    monkeypatch.setattr(type(layer), "plain_operands", lambda self, x: short.append(1))
    y = layer(X, adapter_names=["default"] * 4)
    assert not short and y.shape == (4, 40)
    layer(X)
    assert short == [1]
