"""The search for code that may compute a layer names methods that other packages have put in place, and no others."""

from __future__ import annotations

import functools
import types

import pytest
from torch import nn

from lora_kernels.nn.bypass import replaced, suspect


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.other(self.proj(x))


def kernel(self, x):
    def inner(y):
        return y @ self.proj.weight

    return inner(x)


def elsewhere(self, x):
    return x


def model() -> nn.Module:
    return nn.Sequential(Parent())


def test_a_plain_model_has_no_suspect():
    assert not suspect(model(), "0.proj") and not list(replaced(model())) and not suspect(nn.Linear(2, 2), "")


@pytest.mark.parametrize("wrap", [types.MethodType, lambda f, layer: functools.partial(f, layer)])
def test_a_function_that_names_the_layer_comes_before_one_that_does_not(wrap):
    net = model()
    net[0].forward = wrap(elsewhere, net[0])
    name = f"Parent.forward on the instance is {__name__}.elsewhere"
    assert suspect(net, "0.proj") == f"{name}, which may compute it"
    net[0].kernel = kernel
    assert suspect(net, "0.proj") == f"Parent.kernel on the instance is {__name__}.kernel, which uses proj"
    assert suspect(net, "0.other") == f"{name}, which may compute it"


def test_a_module_further_out_is_named_if_its_code_names_the_layer():
    net = nn.Sequential(model())
    net.forward = types.MethodType(elsewhere, net)
    assert not suspect(net, "0.0.proj")
    net.forward = types.MethodType(kernel, net)
    assert suspect(net, "0.0.proj") == f"Sequential.forward on the instance is {__name__}.kernel, which uses proj"


def test_a_forward_of_the_own_class_on_the_instance_is_none():
    net = model()
    net[0].forward = types.MethodType(Parent.forward, net[0])
    assert not suspect(net, "0.proj")


def test_what_a_hook_of_accelerate_wraps_is_looked_at_and_not_its_wrapper():
    hooks = pytest.importorskip("accelerate.hooks")
    net = model()
    hooks.add_hook_to_module(net[0], hooks.ModelHook())
    assert not suspect(net, "0.proj")
    hooks.remove_hook_from_module(net[0])
    net[0].forward = types.MethodType(kernel, net[0])
    hooks.add_hook_to_module(net[0], hooks.ModelHook())
    assert suspect(net, "0.proj") == f"Parent.forward on the instance is {__name__}.kernel, which uses proj"


def test_a_parent_that_reads_the_weight_in_its_own_source_is_named():
    assert suspect(nn.TransformerEncoderLayer(8, 2, 8), "self_attn.out_proj").startswith(
        "MultiheadAttention.forward reads"
    )
