"""Models that are built on the meta device, where tensors have no memory, and filled later."""

from __future__ import annotations

import pytest
import torch
from support.layer_kinds import KINDS
from torch import nn

from lora_kernels import FusedLoRALinear, apply_lora, quantize_weight


@pytest.fixture(params=KINDS)
def settings(request):
    return KINDS[request.param]


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


# --- to_empty leaves no adapter of old memory ---


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("start", ["meta", "memory"])
def test_a_dense_checkpoint_after_to_empty_finds_a_new_adapter(settings, start, poisoned):
    if start == "meta":
        layers = on_meta(settings)
    else:
        layers = model()
        apply_lora(layers, r=3, **settings)
        for layer in layers:
            nn.init.normal_(layer.lora_B)
    layers.to_empty(device="cpu")
    checkpoint = model()
    layers.load_state_dict(checkpoint.state_dict())
    x, want = torch.randn(3, 64), model()
    want.load_state_dict(checkpoint.state_dict())
    apply_lora(want, r=3, **settings)
    torch.testing.assert_close(layers(x), want(x))
    for layer in layers:
        assert layer.lora_B.count_nonzero() == 0 and 0 < layer.lora_A.abs().max() <= 1 / layer.in_features**0.5


def test_a_dora_that_has_no_w_yet_computes_nan_and_no_old_memory():
    with torch.device("meta"):
        layer = FusedLoRALinear(64, 48, r=3, use_dora=True)
    layer.to_empty(device="cpu")
    assert layer.lora_magnitude_vector.isnan().all()
    with torch.no_grad():
        layer.weight.normal_(), layer.bias.zero_()
    x = torch.randn(2, 64)
    assert layer(x).isnan().all()
    layer.reset_adapter()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight))


@pytest.mark.parametrize("quant", ["nf4", "double", "int8", "fp8"])
def test_reset_parameters_gives_a_quantised_layer_a_new_weight(quant, poisoned):
    layer = on_meta(KINDS[quant])[0].to_empty(device="cpu")
    layer.reset_parameters()
    w, x = layer.quantized_weight().dequantize(torch.float32), torch.randn(2, 64)
    assert 0.05 < w.std() < 0.1  # uniform in ±1/8
    torch.testing.assert_close(layer(x), nn.functional.linear(x, w, layer.bias))


def test_skip_init_makes_an_adapter_that_is_zero(poisoned):
    layer = nn.utils.skip_init(FusedLoRALinear, 64, 48, r=3)
    assert layer.lora_B.count_nonzero() == 0 and layer.lora_A.isfinite().all()


def test_a_merged_layer_may_be_emptied(settings):
    quant = "quant" in settings
    layer = FusedLoRALinear.from_linear(nn.Linear(64, 48), r=3, **settings)
    layer.merge(**({"lossy": True} if quant else {}))
    layer.to("meta").to_empty(device="cpu")
    layer.unmerge()
    linear, x = nn.Linear(64, 48), torch.randn(2, 64)
    layer.load_state_dict(linear.state_dict())
    torch.testing.assert_close(layer(x), linear(x), rtol=0.1 if quant else 1e-4, atol=0.2 if quant else 1e-4)
