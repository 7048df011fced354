"""Layers whose weights accelerate has offloaded: a call computes the same, and what needs the weights says how to bring
them back."""

from __future__ import annotations

import pytest
import torch
from support.layer_kinds import KINDS
from torch import nn

from lora_kernels import FusedLoRALinear, merge_and_unload

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


def test_what_needs_the_weights_says_that_they_are_offloaded(settings):
    net, x = model(**settings), torch.randn(3, 64)
    want, lossy = net(x), {"lossy": True} if "quant" in settings else {}
    accelerate.cpu_offload(net, execution_device="cpu", offload_buffers=True)
    layer = net[0]
    calls = (lambda: layer.merge(**lossy), layer.to_linear, layer.reset_adapter, layer.reset_parameters)
    for call in (*calls, lambda: merge_and_unload(net)):
        with pytest.raises(ValueError, match=REFUSED):
            call()
    layer.unmerge()  # nothing is merged
    assert not layer.merged and torch.equal(net(x), want)
    remove_hook_from_module(net, recurse=True)
    layer.merge(**lossy)
    layer.unmerge()
    assert torch.equal(net(x), want)
    merge_and_unload(net)
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_merged_layer_is_not_computed_from_what_accelerate_has_kept(quant):
    """accelerate keeps the tensors of state_dict(), which has the weight without the adapter."""
    net, x = model(quant=quant), torch.randn(3, 64)
    want = net(x)
    net[0].merge(**({} if quant is None else {"lossy": True}))
    accelerate.cpu_offload(net, execution_device="cpu", offload_buffers=True)
    with pytest.raises(ValueError, match=REFUSED):
        net[0].unmerge()
    with pytest.raises(ValueError, match=r"merged when accelerate offloaded it.*unmerge\(\)"):
        net.eval()(x)
    remove_hook_from_module(net, recurse=True)
    net[0].unmerge()
    assert torch.equal(net(x), want)
