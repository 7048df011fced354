"""Hooks of accelerate that place x and offload nothing are passed over, with what they would have done."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
from accelerate import dispatch_model  # noqa: E402
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from support.old_torch import compiles_whole_models  # noqa: E402
from support.peft_models import Net, config, fused_layers, make, run, same  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.nn.mixed import mixed  # noqa: E402
from lora_kernels.peft import hooked  # noqa: E402
from lora_kernels.peft.fused import Fused  # noqa: E402

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))


def align(device: object = "cpu", **kwargs: object) -> AlignDevicesHook:
    return AlignDevicesHook(execution_device=device, **kwargs)


def parts(layer: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a LoRA layer that PEFT's forward calls."""
    yield layer.base_layer
    for name in layer.lora_A:
        yield from (layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name])
        if name in layer.lora_magnitude_vector:
            yield layer.lora_magnitude_vector[name]


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def all_served(model: nn.Module) -> None:
    assert fused_layers(model) and len(fused_layers(model)) == len(layers(model))
    for layer in fused_layers(model):
        assert layer.fused_calls > 0 and not layer.passed_over, layer.passed_over


def on_parts(model: nn.Module, hook: Callable[[], object] = align) -> None:
    for layer in layers(model):
        for module in parts(layer):
            add_hook_to_module(module, hook())


def on_layers(model: nn.Module) -> None:
    for layer in layers(model):
        add_hook_to_module(layer, align(io_same_device=True))


PLACED = {
    "dispatched": lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "parts": on_parts,
    "layers": on_layers,
    "a sequence": lambda model: on_parts(model, lambda: hooks.SequentialHook(align(), hooks.ModelHook(), align(None))),
    "no device": lambda model: on_parts(model, lambda: align(None, io_same_device=True, skip_keys="x")),
    "appended": lambda model: [add_hook_to_module(each, align(), append=True) for each in [*layers(model)] * 2],
    "removed": lambda model: (on_layers(model), [remove_hook_from_module(each) for each in layers(model)]),
    "offload the model": lambda model: add_hook_to_module(model, hooks.CpuOffload("cpu")),
    "offload the base": lambda model: [
        add_hook_to_module(each.base_layer, hooks.CpuOffload(torch.device("cpu"))) for each in layers(model)
    ],
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("place", PLACED.values(), ids=PLACED)
def test_hooks_that_place_on_one_device_change_nothing(place, before):
    model = make(lora_dropout=0.0)
    want = run(copy.deepcopy(model), X)
    if not before:
        lora_kernels.fuse(model, strict=True)
    place(model)
    if before:
        assert not lora_kernels.fuse(model, strict=True).not_fused
    same(run(model, X), want)
    all_served(model)
    lora_kernels.unfuse(model)
    same(run(model, X), want)
    assert not fused_layers(model)


def test_a_base_that_was_dispatched_before_get_peft_model_is_fused():
    torch.manual_seed(0)
    net = dispatch_model(Net(), {"": "cpu"}, force_hooks=True)
    model = peft.get_peft_model(net, config(init_lora_weights=False))
    want = run(copy.deepcopy(model), X)
    lora_kernels.fuse(model, strict=True)
    same(run(model, X), want)
    all_served(model)


@pytest.mark.parametrize("kwargs", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["up"]}], ids=str)
def test_every_kind_of_adapter_is_served(kwargs):
    model = make(**kwargs)
    want = run(copy.deepcopy(model), X)
    on_parts(model)
    lora_kernels.fuse(model, strict=True)
    same(run(model, X), want, 1e-4)
    all_served(model)


def test_embeddings_and_copies_are_served():
    model, ids = make(target_modules=["emb"]), torch.randint(20, (7,))
    model.base_model.model.forward = types.MethodType(lambda net, ids: net.emb(ids), model.base_model.model)
    want = model(ids)
    dispatch_model(model.base_model.model.emb, {"": "cpu"}, force_hooks=True)
    lora_kernels.fuse(model, strict=True)
    torch.testing.assert_close(model(ids), want)
    assert model.base_model.model.emb.fused_calls == 1
    model = make()
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    want = model(X)
    lora_kernels.fuse(model, strict=True)
    torch.testing.assert_close(copy.deepcopy(model)(X), want)


def test_adapters_by_sample_and_mixed_rows_are_served():
    model = make()
    model.add_adapter("second", config(r=2, init_lora_weights=False))
    names = ["second", "default", "__base__", "default", "second"]
    want = model.eval()(X, adapter_names=names)
    on_parts(model)
    lora_kernels.fuse(model, strict=True)
    torch.testing.assert_close(model(X, adapter_names=names), want)
    with mixed(model, names):
        torch.testing.assert_close(model(X), want)


class Kinds(nn.Module):
    """A layer of each kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attention = nn.Conv1d(6, 8, 3), nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = self.conv(x).transpose(1, 2)
        return self.linear(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["conv", "attention", "linear"])
def test_every_kind_of_layer_is_served(name, before):
    torch.manual_seed(0)
    model = peft.get_peft_model(Kinds(), config(target_modules=[name], init_lora_weights=False)).eval()
    x = torch.randn(2, 6, 9)
    want = run(copy.deepcopy(model), x)
    if before:
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    lora_kernels.fuse(model, strict=True)
    if not before:
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    same(run(model, x), want, 1e-5)
    layer = model.base_model.model.get_submodule(name)
    assert layer.fused_calls == 1 and not layer.passed_over


@pytest.mark.parametrize("kind", [peft.AdaLoraConfig, peft.VeraConfig], ids=lambda kind: kind.__name__)
def test_other_tuners_are_served(kind):
    kwargs = {"total_step": 10, "init_r": 4} if kind is peft.AdaLoraConfig else {"r": 4}
    model = peft.get_peft_model(Net(), kind(target_modules=["up"], **kwargs))
    want = run(copy.deepcopy(model), X)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    lora_kernels.fuse(model, strict=True)
    same(run(model, X), want, 1e-5)
    layer = model.base_model.model.up
    assert layer.fused_calls == 1 and not layer.passed_over


def test_the_stacks_of_experts_are_served():
    pytest.importorskip("transformers")
    from support.experts import inputs
    from support.peft_experts import outer_of, step, wrapped

    model, given = wrapped(), inputs(torch.float64)
    want = step(model, given)
    add_hook_to_module(outer_of(model).get_base_layer(), align())
    add_hook_to_module(outer_of(model).base_layer, align())
    lora_kernels.fuse(model, strict=True)
    same(step(model, given), want, 1e-10)
    assert outer_of(model).fused_calls == 1 and not outer_of(model).passed_over


def test_a_hook_that_arrives_and_goes_between_two_calls_is_seen():
    model = make()
    lora_kernels.fuse(model, strict=True)
    want, base = model(X), model.base_model.model.up.base_layer

    class Doubles(hooks.ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    add_hook_to_module(base, Doubles())
    assert not torch.allclose(model(X), want)
    remove_hook_from_module(base)
    assert torch.equal(model(X), want)
    (why,) = model.base_model.model.up.passed_over
    assert "Doubles" in why and "remove them, or put them on the LoRA layer" in why
    assert model.base_model.model.up.fused_calls == 2


class _Subclass(AlignDevicesHook):
    """A hook that may do something else."""


class _NoGrad(hooks.ModelHook):
    no_grad = True


OTHER = {
    "a hook of the class": lambda module: add_hook_to_module(module, _Subclass("cpu")),
    "offload=True, for which device_map": lambda module: add_hook_to_module(module, align(offload=True)),
    "a forward pre-hook, ": lambda module: module.register_forward_pre_hook(lambda module, args: None),
    "a backward hook, ": lambda module: module.register_full_backward_hook(lambda module, dx, dy: None),
    "with no_grad": lambda module: add_hook_to_module(module, _NoGrad()),
    "a forward of its own, ": lambda module: setattr(module, "forward", lambda x: nn.Linear.forward(module, x)),
    "which moves the weights of modules": lambda module: add_hook_to_module(module, hooks.CpuOffload("meta")),
}


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("what", OTHER)
def test_other_hooks_are_left_to_peft_by_name(what, part):
    model = make(target_modules=["up"])
    OTHER[what](list(parts(model.base_model.model.up))[part])
    (why,) = lora_kernels.fuse(model).not_fused.values()
    assert what in why and "remove them, or put them on the LoRA layer" in why
    if "moves" not in what:
        want = model(X)
        assert not isinstance(model.base_model.model.up, Fused) or model.base_model.model.up.passed_over
        lora_kernels.unfuse(model)
        assert torch.equal(model(X), want)


def device_of_y(fused: bool, given: str, *hooks_of_parts: AlignDevicesHook | None) -> str:
    """Return the device of y for an x on the device `given`, and hooks on the base, lora_A and lora_B of a layer on the
    meta device, which stands for a GPU; the name of the error that is raised instead."""
    model = make(target_modules=["up"], lora_dropout=0.0).eval()
    layer = model.base_model.model.up.to("meta")
    for module, hook in zip(parts(layer), hooks_of_parts, strict=False):
        if hook is not None:
            add_hook_to_module(module, hook)
    if fused:
        lora_kernels.fuse(model)
    try:
        with torch.no_grad():
            y = layer(torch.empty(5, 24, device=given))
    except (RuntimeError, NotImplementedError) as error:
        return type(error).__name__
    assert y.shape == (5, 40) and (not fused or layer.fused_calls == 1)
    return str(y.device)


@pytest.mark.parametrize("given", ["cpu", "meta"])
def test_y_is_on_the_device_on_which_pefts_hooks_leave_it(given):
    def placed() -> list[AlignDevicesHook]:
        return [align("meta"), align("meta"), align("meta")]

    assert device_of_y(False, given, *placed()) == device_of_y(True, given, *placed()) == "meta"


def test_a_module_whose_hooks_do_not_move_x_to_its_weight_is_left_to_peft():
    model = make(target_modules=["up"]).eval()
    layer = model.base_model.model.up.to("meta")
    lora_kernels.fuse(model)
    x = torch.empty(5, 24)
    add_hook_to_module(layer.base_layer, align("meta"))
    assert type(layer.read(x)) is str  # lora_A and lora_B have no hook
    for module in parts(layer):
        add_hook_to_module(module, align("meta"))
    assert isinstance(layer.read(x), hooked.Elsewhere)
    add_hook_to_module(layer.base_layer, align("meta", io_same_device=True))
    assert type(layer.read(x)) is str  # the sum would be of two devices


def test_the_device_of_a_result_follows_from_the_hooks_one_by_one():
    cpu, there = torch.device("cpu"), torch.device("meta")
    linear = nn.Linear(3, 3, device="meta")
    assert hooked.result_of(linear, cpu, there) is None and hooked.result_of(linear, there, there) == there
    add_hook_to_module(linear, align("meta"))
    assert hooked.result_of(linear, cpu, there) == there
    add_hook_to_module(linear, align("meta", io_same_device=True))
    assert hooked.result_of(linear, cpu, there) == cpu
    add_hook_to_module(linear, align("meta", io_same_device=True), append=True)
    assert hooked.result_of(linear, cpu, there) == there  # the last hook has seen x there


def test_a_part_on_another_device_is_left_to_peft():
    model = make(target_modules=["up"])
    layer = model.base_model.model.up
    add_hook_to_module(layer.lora_A["default"], align("meta"))
    (why,) = lora_kernels.fuse(model).not_fused.values()
    assert "adapter 'default' is on meta, and the base weight on cpu: put both on one device" in why


@compiles_whole_models
@pytest.mark.slow
def test_a_dispatched_model_compiles_into_one_graph():
    model = make(target_modules=["up"])
    on_parts(model)
    lora_kernels.fuse(model, strict=True)
    want = model(X)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(X), want)
