"""ms-swift puts a forward on every lora_A and lora_B that moves x to the weight's device: fused layers do the same."""

from __future__ import annotations

import copy
from types import MethodType, ModuleType

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft.tuners.lora import LoraLayer  # noqa: E402
from support.old_torch import compiles_whole_models  # noqa: E402
from support.peft_models import Net, fused_layers, make, run, same  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft import hooked  # noqa: E402

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
SAME = """
def keep_device_forward(self, *args, **kwargs):
    first, rest = args[0], args[1:]
    place = (self.weight if hasattr(self, 'weight') else self.weight0).device
    if place == first.device:
        return self.forward_origin(*args, **kwargs)
    return self.forward_origin(first.to(place), *rest, **kwargs)
"""
OTHER = SAME.replace("self.forward_origin(*args, **kwargs)\n", "self.forward_origin(*args, **kwargs) * self.gain\n", 1)


def function_of(source: str):
    """Return the function of a module that has the name of ms-swift's, and does what `source` says."""
    module = ModuleType("swift.tuners.peft")
    exec(source, module.__dict__)
    return module.keep_device_forward


def patch(model: nn.Module, function) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for lora in [*layer.lora_A.values(), *layer.lora_B.values()]:
                lora.forward_origin = lora.forward
                lora.forward = MethodType(function, lora)


@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}, {"lora_dropout": 0.0, "lora_bias": True}], ids=str)
def test_the_forward_of_ms_swift_is_passed_over(kwargs):
    model = make(**kwargs, target_modules=["up"])
    want = run(copy.deepcopy(model), X)
    patch(model, function_of(SAME))
    lora_kernels.fuse(model, strict=True)
    same(run(model, X), want, 1e-4)
    same(run(copy.deepcopy(model), X), want, 1e-4)
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(model))


@compiles_whole_models
@pytest.mark.slow
def test_a_model_compiles_into_one_graph():
    model = make(target_modules=["up"])
    patch(model, function_of(SAME))
    lora_kernels.fuse(model, strict=True)
    want = model(X)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(X), want)


def test_a_forward_of_that_name_that_does_more_is_left_to_peft():
    model = make(target_modules=["up"])
    patch(model, function_of(OTHER))
    for module in model.modules():
        module.gain = 2.0
    want = model(X)
    (why,) = lora_kernels.fuse(model).not_fused.values()
    assert "swift.tuners.peft.keep_device_forward" in why
    assert torch.equal(model(X), want)


def test_a_base_elsewhere_is_where_x_is_moved_to():
    """The base moves x by a hook of accelerate, and lora_A and lora_B by ms-swift's forward."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = make(target_modules=["up"]).eval()
    layer = model.base_model.model.up.to("meta")
    hooks.add_hook_to_module(layer.base_layer, hooks.AlignDevicesHook("meta"))
    patch(model, function_of(SAME))
    lora_kernels.fuse(model)
    assert isinstance(layer.read(torch.empty(2, 24)), hooked.Elsewhere)
    with torch.no_grad():
        assert layer(torch.empty(2, 24)).device.type == "meta" and layer.fused_calls == 1


def test_a_model_of_ms_swift_itself_is_served():
    tuners = pytest.importorskip("swift.tuners", reason="ms-swift is not installed")
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["up", "down"], "lora_dtype": None, "init_lora_weights": False}
    model = tuners.Swift.prepare_model(Net(), tuners.LoraConfig(**settings))
    want = run(model, X)
    lora_kernels.fuse(model, strict=True)
    same(run(model, X), want, 1e-4)
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(model))
