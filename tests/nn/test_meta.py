"""Models that are built on the meta device, where tensors have no memory, and filled later."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear, apply_lora, quantize_weight

QUANTS = {
    "dense": {},
    "dora": {"use_dora": True},
    "nf4": {"quant": "nf4"},
    "double": {"quant": "nf4", "double_quant": True},
    "int8": {"quant": "int8"},
    "fp8": {"quant": "fp8"},
}


@pytest.fixture(params=QUANTS)
def settings(request):
    return QUANTS[request.param]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32, bias=False))


def on_meta(settings) -> nn.Module:
    with torch.device("meta"):
        made = model()
        apply_lora(made, r=3, **settings)
    return made


@pytest.mark.parametrize("assign", [True, False])
def test_a_dense_checkpoint_fills_the_model_and_the_adapter_gets_first_values(settings, assign):
    checkpoint, empty, x = model().state_dict(), on_meta(settings), torch.randn(3, 64)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(checkpoint, assign=assign)
    if not assign:
        for layer in empty:
            layer.reset_adapter()
    want = model()
    want.load_state_dict(checkpoint)
    apply_lora(want, r=3, **settings)
    assert torch.equal(empty(x), want(x))  # equal although A is random, since B is zero
    for layer in empty:
        assert 0 < layer.lora_A.abs().max() < 1 and layer.lora_A.requires_grad and not layer.weight.requires_grad
    empty(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in empty.parameters() if p.requires_grad)


def test_the_models_own_checkpoint_fills_it(settings):
    full, empty, x = model(), on_meta(settings), torch.randn(3, 64)
    apply_lora(full, r=3, **settings)
    for layer in full:
        nn.init.normal_(layer.lora_B)
    empty.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(empty(x), full(x))


@pytest.mark.parametrize("use_dora", [False, True])
def test_reset_parameters_resets_the_adapter_too(use_dora):
    """FSDP and others call it after to_empty, which leaves arbitrary values."""
    with torch.device("meta"):
        layer = FusedLoRALinear(64, 48, r=3, use_dora=use_dora)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(torch.nan)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert layer.lora_B.count_nonzero() == 0 and layer.lora_A.count_nonzero() == layer.lora_A.numel()
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("scaling", ["tensor", "row", "block"])
def test_quantising_on_the_meta_device_gives_shapes_and_dtypes(format, scaling):
    w = torch.randn(200, 130)
    full, empty = (quantize_weight(t, format, scaling=scaling) for t in (w, w.to("meta")))
    assert [(t.shape, t.dtype) for t in empty.tensors] == [(t.shape, t.dtype) for t in full.tensors]
    assert all(t.is_meta for t in empty.tensors)
