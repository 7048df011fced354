"""Where no kernel is chosen, slow calls are left to PEFT, and `lora_linear` warns of them."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="PEFT is not installed")
from support.old_torch import compiles_whole_models
from support.peft_models import fused_layers, make, run, same

import lora_kernels
from lora_kernels.backends import dispatch
from lora_kernels.peft.fused import Fused

DROPOUT = "no kernel for dropout here, and PEFT's own forward is faster than plain torch operations"


@pytest.fixture
def no_kernel(monkeypatch):
    """Leave the automatic choice nothing but eager, as on a GPU for which no kernel has evidence yet."""
    monkeypatch.setitem(dispatch.AUTOMATIC, "cpu", ("eager",))
    dispatch.cache_clear()
    yield
    dispatch.cache_clear()


def test_dropout_is_left_to_peft(no_kernel):
    model, x = make(lora_dropout=0.3).train(), torch.randn(7, 24)
    torch.manual_seed(5)
    want = run(model, x)
    lora_kernels.fuse(model, strict=True)
    torch.manual_seed(5)
    same(run(model, x), want, rtol=0)  # equal bits, since the masks are PEFT's own
    for layer in fused_layers(model):
        assert layer.fused_calls == 0 and layer.passed_over == Counter({DROPOUT: 1})


def test_a_layer_without_dropout_is_fused(no_kernel):
    model, x = make(lora_dropout=0.3), torch.randn(7, 24)
    lora_kernels.fuse(model, strict=True)
    model.eval()(x)
    assert [layer.fused_calls for layer in fused_layers(model)] == [1, 1]


def test_a_named_back_end_keeps_the_fused_path(no_kernel):
    model, x = make(lora_dropout=0.3).train(), torch.randn(7, 24)
    lora_kernels.fuse(model, strict=True, backend="eager")
    run(model, x)
    assert [(layer.fused_calls, layer.passed_over) for layer in fused_layers(model)] == [(1, Counter())] * 2


class Pair(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40, dtype=dtype), nn.Linear(24, 16, dtype=dtype)

    def forward(self, x):
        return torch.cat([self.up(x), self.down(x)], -1)


@pytest.mark.parametrize(("p", "calls"), [(0.3, 0), (0.0, 1)])
def test_a_group_with_dropout_is_left_to_peft(no_kernel, p, calls):
    model, x = make(net=Pair, lora_dropout=p).train(), torch.randn(7, 24)
    report = lora_kernels.fuse(model, strict=True, group=[("up", "down")])
    run(model, x)
    (group,) = report.groups.values()
    assert group.calls == calls and [layer.fused_calls for layer in fused_layers(model)] == [calls] * 2


@pytest.mark.parametrize(("dtype", "adapters"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_with_a_kernel_the_layer_is_fused(dtype, adapters):
    model, x = make(dtype, lora_dropout=0.3).train(), torch.randn(7, 24, dtype=dtype)
    assert all(layer.weight.dtype == adapters for name, layer in model.named_modules() if name.endswith("A.default"))
    lora_kernels.fuse(model, strict=True)
    run(model, x)
    assert [layer.fused_calls for layer in fused_layers(model)] == [1, 1]


@compiles_whole_models
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_model_leaves_dropout_to_peft(no_kernel, dynamic):
    model, x = make(lora_dropout=0.3).train(), torch.randn(7, 24)
    lora_kernels.fuse(model, strict=True)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)(x)
    assert seen and not [name for name in seen if "lora_kernels" in name or "LoRALinear" in name]


def test_weights_of_bitsandbytes_are_left_to_peft(no_kernel):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from support import bnb_models

    model, x = bnb_models.make().train(), torch.randn(5, 64)
    lora_kernels.fuse(model, strict=True)
    model(x)
    reason = DROPOUT.replace("dropout", "a weight in nf4")
    found = [layer for layer in model.modules() if isinstance(layer, Fused)]
    assert [(layer.fused_calls, layer.passed_over) for layer in found] == [(0, Counter({reason: 1}))] * 2


def operands(dtype=torch.float32):
    return tuple(torch.randn(shape, dtype=dtype) for shape in ((3, 16), (24, 16), (2, 16), (24, 2)))


def test_a_slow_choice_warns_and_names_the_way_out(no_kernel):
    x, w, a, b = operands()
    with pytest.warns(UserWarning, match=r"torch\.float32 on cpu here: the dropout mask is drawn .* slow\. .* doctor"):
        lora_kernels.lora_linear(x, w, a, b, scale=1.0, dropout_p=0.1)
    with pytest.warns(UserWarning, match="the int8 weight is dequantised"):
        lora_kernels.lora_linear(x, lora_kernels.quantize_weight(w, "int8"), a, b, scale=1.0)


def test_no_warning_where_nothing_is_slow(no_kernel):
    x, w, a, b = operands()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_kernels.lora_linear(x, w, a, b, scale=1.0)
        lora_kernels.lora_linear(x, w, a, b, scale=1.0, dropout_p=0.1, backend="eager")
        lora_kernels.explain(x, w, a, b, dropout_p=0.1)
        dispatch.AUTOMATIC["cpu"] = ("cpu", "eager")
        dispatch.automatic.cache_clear()
        lora_kernels.lora_linear(x, w, a, b, scale=1.0, dropout_p=0.1)
