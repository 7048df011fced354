"""`usage` tells by their calls what became of the layers with an adapter: counts are those of hooks, and every layer
that the model has passed over is named with the code that computes it."""

from __future__ import annotations

import copy
import json
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from support import kind_models
from torch import nn

import lora_kernels
from lora_kernels import usage
from lora_kernels.analysis import usage as usage_module
from lora_kernels.nn.adapter import AdapterLayer

pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from support.peft_models import Net, make

X = torch.randn(4, 24)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """What other tests of the process have compiled does not count here."""
    monkeypatch.setattr(usage_module, "_has_compiled", lambda: False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return x + self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(x)) + self.v_proj(x))


class Blocks(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def blocks(**kwargs) -> nn.Module:
    return get_peft_model(Blocks(), LoraConfig(**({"target_modules": r".*_proj"} | kwargs)))


def product(x, layer):
    """Compute a layer as the kernels of other packages do, past its forward."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return F.linear(x, layer.base_layer.weight, layer.base_layer.bias) + F.linear(F.linear(x, a), b)


def past_the_layers(self, x):
    y = torch.tanh(product(x, self.q_proj) * product(x, self.k_proj)) + product(x, self.v_proj)
    return x + self.o_proj(y)


def count_calls(model: nn.Module, kinds: tuple[type, ...]) -> dict[str, int]:
    """Return a dictionary that a forward hook on each layer fills with its calls."""
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            calls[name] = 0
            module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    return calls


@pytest.mark.parametrize("group", [False, True])
def test_the_calls_are_those_that_hooks_count(group):
    model = blocks()
    lora_kernels.fuse(model, group=group)
    calls = count_calls(model, (LoraLayer,))
    x = torch.randn(3, 8)
    model(x), model(x).sum().backward()
    with model.disable_adapter():
        model(x)
    report = usage(model)
    assert {row.name: row.calls for row in report.rows} == calls and set(calls.values()) == {3}
    assert all((row.fused_calls, row.base_calls, row.state) == (2, 1, "fused") for row in report.rows)
    assert [calls for _, calls in report.groups.values()] == [2, 2, 2] * group


@pytest.mark.parametrize("kind", kind_models.KIND_MODELS)
def test_layers_of_this_package_count_their_calls_merged_or_not(kind):
    case = kind_models.KIND_MODELS[kind]
    torch.manual_seed(0)
    model = case.make()
    lora_kernels.apply_lora(model, r=2, **case.rules)
    x = case.inputs(torch.Generator().manual_seed(0))
    assert {row.state for row in usage(model).rows} == {"not run"}
    calls = count_calls(model, (AdapterLayer,))
    model(x), model(x)
    report = usage(model, strict=True)
    assert {row.name: row.fused_calls for row in report.rows} == {row.name: calls[row.name] for row in report.rows}
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    for layer in layers:
        layer.merge()
    model.eval()(x)
    since = usage(model).since(report)
    assert {row.state for row in since.rows} == {"no adapter"} and all(
        row.calls == row.base_calls for row in since.rows
    )


def test_layers_computed_by_a_forward_on_the_instance_are_never_called():
    model = blocks()
    report = lora_kernels.fuse(model)
    for layer in model.base_model.model.layers[:2]:
        layer.forward = types.MethodType(past_the_layers, layer)
    assert not usage(model).of("never called") and usage(model).of("not run")
    model(torch.randn(3, 8)).sum().backward()
    found = usage(model)
    never = found.of("never called")
    assert len(found.rows) == 12 and len(never) == 6 and len(found.of("fused")) == 6
    name = f"{__name__}.past_the_layers"
    for row in never:
        child = row.name.rpartition(".")[2]
        assert row.why == (
            f"Block.forward on the instance is {name}, which uses {child}; its adapter has a gradient, so other code "
            "has computed it"
        )
    text = str(found)
    assert text.startswith(
        "6 of 12 LoRA layers were computed by their fused forward in every call; "
        "6 never called although the model has run"
    )
    assert "base_model.model.layers.{0,1}.q_proj × 2" in text and "base_model.model.layers.2.q_proj " in text
    assert "usage(model) tells which code" in str(report)
    with pytest.raises(RuntimeError, match="6 never called although the model has run"):
        usage(model, strict=True)


def test_a_model_that_is_computed_past_every_layer_has_run_if_its_adapters_have_gradients():
    class Whole(Block):
        def forward(self, x):
            return product(x, self.q_proj)

    model = get_peft_model(nn.Sequential(Whole()), LoraConfig(target_modules=["q_proj"]))
    lora_kernels.fuse(model)
    before = usage(model)
    model(torch.randn(3, 8))
    assert {row.state for row in usage(model).rows} == {"not run"}
    model(torch.randn(3, 8)).sum().backward()
    (row,) = usage(model).of("never called")
    assert row.why == "its adapter has a gradient, so other code has computed it"
    assert {row.state for row in usage(model).since(before).rows} == {"not run"}  # the gradient may be older


def test_the_function_in_an_attribute_that_a_forward_of_another_package_calls_is_named():
    def apply_qkv(self, x):
        return tuple(product(x, layer) for layer in (self.q_proj, self.k_proj, self.v_proj))

    def fast_forward(self, x):
        q, k, v = self.apply_qkv(self, x)
        return x + self.o_proj(torch.tanh(q * k) + v)

    class Attention(Block):
        pass

    apply_qkv.__module__, apply_qkv.__qualname__ = "fast_package.kernels", "apply_lora_qkv"
    fast_forward.__module__, fast_forward.__qualname__ = "fast_package.llama", "attention_fast_forward"
    Attention.forward = fast_forward
    model = get_peft_model(nn.Sequential(Attention()), LoraConfig(target_modules=r".*_proj"))
    model.base_model.model[0].apply_qkv = apply_qkv
    lora_kernels.fuse(model)
    model(torch.randn(3, 8))
    why = {row.name.rpartition(".")[2]: row.why for row in usage(model).of("never called")}
    assert sorted(why) == ["k_proj", "q_proj", "v_proj"]
    assert (
        why["q_proj"] == "Attention.apply_qkv on the instance is fast_package.kernels.apply_lora_qkv, which uses q_proj"
    )


def test_a_forward_that_another_package_has_put_on_the_class_is_named():
    class Attention(Block):
        pass

    def replaced(self, x):
        return past_the_layers(self, x)

    replaced.__module__, replaced.__qualname__ = "other_package.patch", "lora_forward"
    Attention.forward = replaced
    model = get_peft_model(nn.Sequential(Attention()), LoraConfig(target_modules=r".*_proj"))
    lora_kernels.fuse(model)
    model(torch.randn(3, 8))
    assert {row.why for row in usage(model).of("never called")} == {
        "Attention.forward is other_package.patch.lora_forward, which may compute it"
    }


def test_a_layer_that_no_input_reaches_has_no_suspect():
    class Sometimes(Net):
        def forward(self, x):
            return self.head(self.down(x)) if x.shape[-1] == 40 else self.head(x)

    model = get_peft_model(Sometimes(), LoraConfig(target_modules=["up", "down"]))
    lora_kernels.fuse(model)
    model(torch.randn(2, 40))
    (row,) = usage(model).of("never called")
    assert row.name.endswith("up") and row.why == "no input has reached it, or other code reads its weights"


def test_hooks_of_accelerate_are_no_suspects():
    hooks = pytest.importorskip("accelerate.hooks")
    model = blocks()
    lora_kernels.fuse(model)
    inner = model.base_model.model.layers[0]
    hooks.add_hook_to_module(inner, hooks.AlignDevicesHook(execution_device="cpu"))
    model.base_model.model.layers[1](torch.randn(3, 8))
    never = usage(model).of("never called")
    assert len(never) == 8 and {row.why for row in never} == {
        "no input has reached it, or other code reads its weights"
    }


def test_calls_that_are_left_to_peft_are_told_with_their_reasons():
    model = make()
    lora_kernels.fuse(model)
    model(X)
    handle = model.base_model.model.up.base_layer.register_forward_hook(lambda *_: None)
    before = usage(model)
    model(X), model(X)
    handle.remove()
    up, down = usage(model).rows
    assert (up.state, down.state) == ("partly fused", "fused")
    assert up.why.startswith("its base layer has hooks, which the fused path would pass over")
    assert up.why.endswith("(2 of 3 calls)")
    up, down = usage(model).since(before).rows
    assert (up.state, up.calls, down.state, down.calls) == ("left to PEFT", 2, "fused", 2)


def test_layers_that_are_not_fused_say_why():
    model = make()
    assert {row.why for row in usage(model).rows} == {"PEFT's own layer, which lora_kernels.fuse(model) would fuse"}
    model.base_model.model.up.forward = types.MethodType(type(model.base_model.model.up).forward, object())
    lora_kernels.fuse(model)
    (row,) = usage(model).of("not fused")
    assert row.name.endswith("up") and "replaced on the instance" in row.why


@pytest.mark.parametrize("how", ["disabled", "merged", "another adapter"])
def test_calls_without_an_adapter_are_no_fused_calls_and_the_layer_is_called(how):
    model = make()
    lora_kernels.fuse(model)
    if how == "disabled":
        model.disable_adapter_layers()
    elif how == "merged":
        model.merge_adapter()
    else:
        model.add_adapter("second", LoraConfig(target_modules=["down"]))
        model.set_adapter("second")
    model(X)
    states = [row.state for row in usage(model).rows]
    assert states == ["no adapter", "fused" if how == "another adapter" else "no adapter"]


@pytest.mark.parametrize("make_twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("ours", [False, True])
def test_copies_and_pickles_begin_with_the_calls_of_their_original(make_twin, ours):
    model = Net() if ours else make()
    lora_kernels.apply_lora(model, target_modules=["up", "down"]) if ours else lora_kernels.fuse(model)
    model(X)
    twin = make_twin(model)
    before = usage(twin)
    assert {row.calls for row in before.rows} == {1}
    twin(X)
    assert {row.calls for row in usage(twin).since(before).rows} == {1}
    assert {row.calls for row in usage(model).rows} == {1}


def test_nothing_is_never_called_before_the_model_has_run_in_a_period():
    model = make()
    lora_kernels.fuse(model)
    model(X)
    assert {row.state for row in usage(model).since(usage(model)).rows} == {"not run"}


def test_a_layer_that_is_fused_anew_counts_again_from_nothing():
    model = make()
    lora_kernels.fuse(model)
    model(X), model(X)
    before = usage(model)
    lora_kernels.unfuse(model)
    lora_kernels.fuse(model)
    model(X)
    assert [row.fused_calls for row in usage(model).since(before).rows] == [1, 1]


_LONG = ("in place", "a part")


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


@pytest.mark.parametrize("how", ["wrapper", "a forward", *(pytest.param(x, marks=pytest.mark.slow) for x in _LONG)])
def test_calls_in_compiled_code_are_not_counted_and_not_never_called(monkeypatch, how):
    torch._dynamo.reset()
    monkeypatch.undo()  # `_has_compiled` is asked here
    plain = Linears()
    lora_kernels.apply_lora(plain)
    model, x = plain, torch.randn(3, 4)
    inner = plain.layers[1]
    if how == "wrapper":
        model = torch.compile(plain, backend="eager")
    elif how == "in place":
        plain.compile(backend="eager")
    elif how == "a part":
        inner.compile(backend="eager")
    else:
        inner.forward = torch.compile(inner.forward, backend="eager")
    model(x)
    report = usage(model)
    assert report.compiled and len(report.rows) == 2 and not report.of("never called")
    expected = {"not counted": 2} if how in ("wrapper", "in place") else {"fused": 1, "not counted": 1}
    assert report.as_dict()["states"] == expected
    assert "torch.compile, which counts none, has compiled code" in str(report)


@pytest.mark.slow
def test_a_function_that_calls_the_model_in_compiled_code_leaves_it_uncounted(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.undo()
    model = Linears()
    lora_kernels.apply_lora(model)
    torch.compile(lambda x: model(x) * 2, backend="eager")(torch.randn(3, 4))
    assert {row.state for row in usage(model).rows} <= {"not counted"}


def test_a_model_without_adapters_is_told_and_strict_raises():
    assert str(usage(Net())) == "the model has no layer with an adapter that is served; it has none at all"
    with pytest.raises(RuntimeError, match="it has none at all"):
        usage(Net(), strict=True)


def test_layers_of_other_libraries_are_named():
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A = nn.Parameter(torch.zeros(2, 2))

    Foreign.__module__ = "loralib.layers"
    with pytest.raises(RuntimeError, match=r"it has 1 layer of loralib\.layers.*Foreign, .*load_loralib"):
        usage(nn.Sequential(Foreign()), strict=True)
    model = blocks()
    model.base_model.model.other = Foreign()
    assert "beside these, 1 layer of loralib.layers" in str(usage(model))
    assert "beside these, 1 layer of loralib.layers" in str(lora_kernels.fuse(model))


def test_the_report_is_plain_data_and_its_table_may_be_full():
    model = blocks()
    lora_kernels.fuse(model, group=True)
    model(torch.randn(3, 8))
    report = usage(model)
    told = json.loads(report.to_json())
    assert told["layers"] == 12 and told["states"] == {"fused": 12} and told["compiled"] is False
    assert told["rows"][0] == {
        "name": "base_model.model.layers.0.q_proj", "layer": "Linear", "size": "8→8, default r=8", "state": "fused",
        "why": "", "fused_calls": 1, "base_calls": 0, "left_calls": {},
    }  # fmt: skip
    assert told["groups"]["base_model.model.layers.0"] == {"layers": ["q_proj", "k_proj", "v_proj"], "calls": 1}
    assert "base_model.model.layers.{0..2}: " not in report.table(full=True)
    assert report.table(full=True).count("\n") == 12 + 3 and str(report).count("\n") == 4 + 1
    with pytest.raises(ValueError, match="there is no state 'slow': one of fused"):
        report.of("slow")


def test_usage_changes_nothing():
    model = blocks()
    lora_kernels.fuse(model, group=True)
    model(torch.randn(3, 8))
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    counts = {name: copy.copy(module.__dict__.get("passed_over")) for name, module in model.named_modules()}
    usage(model)
    assert before == {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert counts == {name: module.__dict__.get("passed_over") for name, module in model.named_modules()}
