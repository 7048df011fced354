"""Layers whose weights accelerate has offloaded: they compute and merge as others do, and what cannot be done says how
to bring the weights back."""

from __future__ import annotations

import copy

import pytest
import torch
from support.adapter_models import train
from support.kind_models import KIND_MODELS
from support.layer_kinds import KINDS
from torch import nn

from lora_kernels import FusedLoRALinear, apply_lora, merge_and_unload
from lora_kernels.models.kinds import lora_layers

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import remove_hook_from_module  # noqa: E402

REFUSED = "meta device.*accelerate has offloaded.*remove_hook_from_module"


@pytest.fixture(params=KINDS)
def settings(request):
    return KINDS[request.param]


def model(**settings) -> nn.Sequential:
    layer = FusedLoRALinear.from_linear(nn.Linear(64, 32), r=4, **settings)
    nn.init.normal_(layer.lora_B)
    return nn.Sequential(layer)


@pytest.mark.parametrize("buffers", [False, True])
def test_an_offloaded_layer_computes_the_same(settings, buffers):
    net, x = model(**settings), torch.randn(3, 64)
    want = net(x)
    accelerate.cpu_offload(net, execution_device="cpu", offload_buffers=buffers)
    assert torch.equal(net(x), want) and all(p.is_meta for p in net.parameters())


def test_a_layer_computes_the_same_from_a_disk(settings, tmp_path):
    net, x = model(**settings), torch.randn(3, 64)
    want = net(x)
    accelerate.disk_offload(net, tmp_path, execution_device="cpu", offload_buffers=True)
    assert torch.equal(net(x), want)


def test_what_gives_new_values_says_that_they_are_offloaded(settings):
    net, x = model(**settings), torch.randn(3, 64)
    want = net(x)
    accelerate.cpu_offload(net, execution_device="cpu", offload_buffers=True)
    for call in (net[0].reset_adapter, net[0].reset_parameters):
        with pytest.raises(ValueError, match=REFUSED):
            call()
    assert torch.equal(net(x), want)


def offload(net, how, folder):
    """Offload `net` in the ways of accelerate; the second also leaves the buffers where they are."""
    if how == "disk":
        accelerate.disk_offload(net, folder, execution_device="cpu", offload_buffers=True)
    elif how == "device map":
        accelerate.dispatch_model(net, {"0": "disk"}, main_device="cpu", offload_dir=folder, force_hooks=True)
    else:
        accelerate.cpu_offload(net, execution_device="cpu", offload_buffers=how == "cpu")


WAYS = ["cpu", "cpu without buffers", "disk", "device map"]


@pytest.mark.parametrize("how", WAYS)
def test_an_offloaded_layer_merges_as_another_does(settings, how, tmp_path):
    net, x = model(**settings).eval(), torch.randn(3, 64)
    want, lossy = net(x), {"lossy": True} if "quant" in settings else {}
    twin = copy.deepcopy(net)
    report, merged = twin[0].merge(**lossy), twin(x)
    layer, stored = net[0], net[0].weight.clone()
    offload(net, how, tmp_path)
    assert torch.equal(layer.to_linear().weight, copy.deepcopy(twin[0]).to_linear().weight) or lossy
    for _ in range(2):
        assert layer.merge(**lossy) == report and layer.merged
        assert torch.equal(layer._hf_hook.weights_map["weight"], twin[0].weight)
        assert torch.equal(net(x), merged) and all(p.is_meta for p in net.parameters())
        layer.unmerge()
        assert torch.equal(layer._hf_hook.weights_map["weight"], stored) and not layer.merged
        assert torch.equal(net(x), want) and all(p.is_meta for p in net.parameters())
    layer.merge(**lossy)
    remove_hook_from_module(net, recurse=True)
    assert torch.equal(net(x), merged)
    layer.unmerge()
    assert torch.equal(net(x), want) and not any(p.is_meta for p in net.parameters())


@pytest.mark.parametrize("first", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("how", WAYS)
def test_merge_and_unload_leaves_a_model_offloaded(settings, how, first, tmp_path):
    net, x = model(**settings).eval(), torch.randn(3, 64)
    want, lossy = copy.deepcopy(net), {"lossy": True} if "quant" in settings else {}
    offload(net, how, tmp_path)
    for each in (net, want):
        if first:
            each[0].merge(**lossy)
        merge_and_unload(each)
    assert type(net[0]) is nn.Linear and all(p.is_meta and not p.requires_grad for p in net.parameters())
    assert torch.equal(net[0]._hf_hook.weights_map["weight"], want[0].weight)
    assert torch.equal(net(x), want(x))
    remove_hook_from_module(net, recurse=True)
    assert torch.equal(net[0].weight, want[0].weight) and torch.equal(net(x), want(x))


def test_a_merge_that_fails_leaves_an_offloaded_layer_as_it_was(settings):
    net = model(**settings)
    nn.init.constant_(net[0].lora_B, float("inf"))
    accelerate.cpu_offload(net, execution_device="cpu", offload_buffers=True)
    layer, kept = net[0], net[0]._hf_hook.weights_map
    for call in (
        lambda: layer.merge(**({"lossy": True} if "quant" in settings else {})),
        lambda: merge_and_unload(net),
    ):
        with pytest.raises(ValueError, match="not finite"):
            call()
        assert net[0] is layer and not layer.merged and layer._hf_hook.weights_map is kept
        assert all(p.is_meta for p in net.parameters())


def test_the_state_of_a_merged_offloaded_model_is_that_of_the_base(settings):
    net, lossy = model(**settings), {"lossy": True} if "quant" in settings else {}
    want = {key: value.clone() for key, value in net.state_dict().items()}
    accelerate.cpu_offload(net, execution_device="cpu", offload_buffers=True)
    net[0].merge(**lossy)
    found = accelerate.utils.modeling.get_state_dict_offloaded_model(net)
    assert found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)


def test_a_tied_head_keeps_its_weight_where_the_model_is_offloaded():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 8).requires_grad_(False)
            self.head = FusedLoRALinear.from_linear(nn.Linear(8, 16, bias=False), r=2)
            self.head.weight = self.embed.weight
            nn.init.normal_(self.head.lora_B)

        def forward(self, ids):
            return self.head(self.embed(ids))

    net, ids = Tied().eval(), torch.arange(16)
    embedded, want = net.embed(ids), net(ids)
    accelerate.cpu_offload(net, execution_device="cpu")
    net.head.merge()
    torch.testing.assert_close(net(ids), want)
    assert torch.equal(net.embed(ids), embedded)
    merge_and_unload(net)
    torch.testing.assert_close(net(ids), want)
    assert torch.equal(net.embed(ids), embedded)


def test_values_that_a_module_around_keeps_are_refused_with_the_way_out(settings):
    net, x = model(**settings), torch.randn(3, 64)
    want, lossy = net(x), {"lossy": True} if "quant" in settings else {}
    accelerate.cpu_offload(net, execution_device="cpu", offload_buffers=True, preload_module_classes=["Sequential"])
    layer = net[0]
    for call in (lambda: layer.merge(**lossy), layer.to_linear, lambda: merge_and_unload(net)):
        with pytest.raises(ValueError, match=REFUSED):
            call()
    assert not layer.merged and torch.equal(net(x), want)
    remove_hook_from_module(net, recurse=True)
    layer.merge(**lossy)
    layer.unmerge()
    assert torch.equal(net(x), want)


def test_a_merged_layer_notices_that_a_module_around_it_has_put_w_back(settings):
    net, x = model(**settings).eval(), torch.randn(3, 64)
    want, lossy = net(x), {"lossy": True} if "quant" in settings else {}
    net[0].merge(**lossy)
    merged = net(x)
    accelerate.cpu_offload(net, execution_device="cpu", offload_buffers=True, preload_module_classes=["Sequential"])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"its weight is W without the adapter.*unmerge\(\)"):
            net(x)
    remove_hook_from_module(net, recurse=True)
    net[0].unmerge()
    assert torch.equal(net(x), want)
    net[0].merge(**lossy)
    assert torch.equal(net(x), merged)


def test_a_merged_layer_takes_another_parameter_of_the_same_values(settings):
    net, x = model(**settings).eval(), torch.randn(3, 64)
    lossy = {"lossy": True} if "quant" in settings else {}
    net[0].merge(**lossy)
    want, copied = net(x), copy.deepcopy(net)
    for each in (net, copied):
        assert each[0]._merged_as is each[0].weight
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            each.double().float()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
        assert each[0]._merged_as is each[0].weight and torch.equal(each(x), want)
        each[0]._parameters["weight"] = nn.Parameter(each[0].weight.detach().clone(), requires_grad=False)
        assert torch.equal(each(x), want) and each[0]._merged_as is each[0].weight
    zero = model(**settings)
    nn.init.zeros_(zero[0].lora_B)
    zero[0].merge(**lossy)
    zero[0]._parameters["weight"] = nn.Parameter(zero[0].weight.detach().clone(), requires_grad=False)
    zero.eval()(x)  # the merged weight is W here


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_merged_layer_is_not_computed_from_what_accelerate_has_kept(quant):
    """accelerate keeps the tensors of state_dict(), which has the weight without the adapter."""
    net, x = model(quant=quant), torch.randn(3, 64)
    want = net(x)
    net[0].merge(**({} if quant is None else {"lossy": True}))
    accelerate.cpu_offload(net, execution_device="cpu", offload_buffers=True)
    with pytest.raises(ValueError, match=REFUSED):
        net[0].unmerge()
    for call in (lambda: net.eval()(x), net[0].to_linear, lambda: merge_and_unload(net)):
        with pytest.raises(ValueError, match=r"merged when accelerate offloaded it.*unmerge\(\)"):
            call()
    remove_hook_from_module(net, recurse=True)
    net[0].unmerge()
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("kind", ["convolution", "embedding", "experts"])
def test_a_merged_layer_of_another_kind_does_not_compute_without_its_adapter(kind, around):
    net = KIND_MODELS[kind].plain()
    apply_lora(net, r=2, **KIND_MODELS[kind].rules)
    train(net).eval()
    want = KIND_MODELS[kind].run(net)
    layers = [layer for layer in lora_layers(net).values() if not isinstance(layer, FusedLoRALinear)]
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(KIND_MODELS[kind].run(net), want)
    accelerate.cpu_offload(net, execution_device="cpu", preload_module_classes=[type(net).__name__] if around else None)
    with pytest.raises(ValueError, match="meta device"):
        merge_and_unload(net)
    for call in (KIND_MODELS[kind].run, merge_and_unload):  # the failed forward leaves accelerate's values there
        with pytest.raises(ValueError, match="without the adapter"):
            call(net)
    remove_hook_from_module(net, recurse=True)
    for layer in layers:
        layer.unmerge()
    torch.testing.assert_close(KIND_MODELS[kind].run(net), want)
