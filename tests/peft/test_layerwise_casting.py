"""Weights that hooks store in one dtype and convert to another in every call: a fused layer converts them itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
from peft.helpers import disable_input_dtype_casting  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from support.peft_models import config, fused_layers, make, run, same  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.quant.weight import QuantizedWeight  # noqa: E402

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(E4M3, FP32), (E4M3, BF16), (E4M3, FP16), (E5M2, BF16), (BF16, FP32), (FP32, BF16)]
X = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))


def by_accelerate(model: nn.Module, storage: torch.dtype, compute: torch.dtype) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            hooks.add_hook_to_module(layer.base_layer, hooks.LayerwiseCastingHook(storage, compute, False))


def by_diffusers(model: nn.Module, storage: torch.dtype, compute: torch.dtype) -> None:
    casting = pytest.importorskip("diffusers.hooks", reason="diffusers is not installed")
    casting.apply_layerwise_casting(model, storage, compute, skip_modules_pattern=("lora_", "head", "emb"))


Cast = Callable[[nn.Module, torch.dtype, torch.dtype], None]
cast_by = pytest.mark.parametrize("cast", [by_accelerate, by_diffusers])


def model_of(compute: torch.dtype, **kwargs) -> nn.Module:
    model = make(compute, **kwargs)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A.to(compute), layer.lora_B.to(compute)
    return model


def rounded(model: nn.Module, storage: torch.dtype, compute: torch.dtype) -> nn.Module:
    """Return a copy without hooks, whose base weights have the values that are computed with."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.base_layer.to(storage).to(compute)
    return model


@cast_by
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("storage", "compute"), PAIRS, ids=str)
def test_values_and_gradients_are_those_of_the_converted_weights(storage, compute, before, cast: Cast):
    model, x = model_of(compute), X.to(compute)
    inner, want = model.base_model.model, rounded(model, storage, compute)
    want = run(want, x)
    if before:
        cast(model, storage, compute)
    assert not lora_kernels.fuse(model, strict=True).not_fused
    if not before:
        cast(model, storage, compute)
    same(run(model, x), want, 1e-5 if compute == FP32 else 5e-2)
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(model))
    assert len(fused_layers(model)) == 2 and inner.up.base_layer.weight.dtype == storage


def test_a_weight_in_e4m3_is_read_as_it_is_stored():
    """The kernels multiply the codes by a scale of one, so y has the bits of a product with the converted W."""
    model = model_of(FP32, target_modules=["up"])
    want = rounded(model, E4M3, FP32)
    by_accelerate(model, E4M3, FP32)
    lora_kernels.fuse(model, strict=True)
    layer = model.base_model.model.up
    w, _ = layer.read_base(layer)
    if not isinstance(w, QuantizedWeight):
        pytest.skip("no kernel reads fp8 here")
    assert w.format == "fp8" and w.codes.data_ptr() == layer.base_layer.weight.data_ptr()
    assert torch.equal(w.dequantize(FP32), want.base_model.model.up.base_layer.weight)
    nan = layer.base_layer.weight.data.view(torch.uint8)[3:4, 5:6]
    nan.fill_(0x7F)
    assert model.base_model.model.up(X).isnan().any(0).nonzero().flatten().tolist() == [3]


def test_dora_over_fp8_is_computed_where_pefts_own_forward_raises():
    model = model_of(FP32, use_dora=True, target_modules=["up"])
    want = run(rounded(model, E4M3, FP32), X)
    by_accelerate(model, E4M3, FP32)
    with pytest.raises(RuntimeError, match="Float8"):
        model(X)
    lora_kernels.fuse(model, strict=True)
    same(run(model, X), want, 1e-5)


def test_convolutions_are_served():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(6, 8, 3), nn.Tanh())
    model = peft.get_peft_model(net, config(target_modules=["0"], init_lora_weights=False))
    x, want = torch.randn(2, 6, 9), rounded(model, E4M3, FP32)
    by_accelerate(model, E4M3, FP32)
    lora_kernels.fuse(model, strict=True)
    same(run(model, x), run(want, x), 1e-5)
    assert model.base_model.model[0].fused_calls == 1


class Pair(nn.Module):
    """Two layers that read the same x."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(24, 16, dtype=dtype), nn.Linear(24, 16, dtype=dtype)

    def forward(self, x):
        return self.left(x) + self.right(x)


def test_layers_of_a_group_compute_alone():
    model = model_of(FP32, net=Pair, target_modules=["left", "right"])
    want = run(rounded(model, E4M3, FP32), X)
    by_accelerate(model, E4M3, FP32)
    report = lora_kernels.fuse(model, group=[("left", "right")])
    same(run(model, X), want, 1e-5)
    (shared,) = report.groups.values()
    assert shared.calls == 0 and any("hooks convert its weights in every call" in why for why in shared.passed_over)


def with_cast_adapter(storage: torch.dtype, compute: torch.dtype) -> nn.Module:
    model = model_of(compute, target_modules=["up"])
    layer = model.base_model.model.up
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        hooks.add_hook_to_module(module, hooks.LayerwiseCastingHook(storage, compute, False))
    return model


@pytest.mark.parametrize(("storage", "compute"), [(E4M3, BF16), (BF16, FP32)], ids=str)
def test_adapters_that_are_converted_too_are_served_without_gradients(storage, compute):
    model, x = with_cast_adapter(storage, compute), X.to(compute)
    layer = model.base_model.model.up
    with disable_input_dtype_casting(model), torch.no_grad():
        want = model(x)
        assert not lora_kernels.fuse(model, strict=True).not_fused
        torch.testing.assert_close(model(x), want, rtol=2e-2, atol=2e-2)
    assert layer.fused_calls == 1 and not layer.passed_over
    with disable_input_dtype_casting(model):
        model(x)
    (why,) = layer.passed_over
    assert "in which it would have its gradients: leave what is trained out of it" in why


def test_adapters_whose_dtype_peft_converts_x_to_are_left_to_peft():
    model = with_cast_adapter(BF16, FP32)
    (why,) = lora_kernels.fuse(model).not_fused.values()
    assert "from torch.bfloat16 to torch.float32" in why and "disable_input_dtype_casting" in why


def test_the_hooks_of_diffusers_keep_pefts_dtype_of_x():
    casting = pytest.importorskip("diffusers.hooks", reason="diffusers is not installed")
    model = model_of(BF16, target_modules=["up"]).eval()
    casting.apply_layerwise_casting(model, E4M3, BF16, skip_modules_pattern=("head", "emb", "down"))
    x = X.bfloat16()
    with torch.no_grad():
        want = model(x)
        assert not lora_kernels.fuse(model, strict=True).not_fused
        torch.testing.assert_close(model(x), want, rtol=2e-2, atol=2e-2)
        lora_kernels.unfuse(model)
        assert torch.equal(model(x), want)


def test_a_unet_of_diffusers_is_served():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    net = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    net.add_adapter(config(target_modules=["to_k", "to_q", "to_v", "to_out.0"], init_lora_weights=False))
    net.enable_layerwise_casting(storage_dtype=E4M3, compute_dtype=FP32)
    given = {
        "hidden_states": torch.randn(1, 6, 4), "encoder_hidden_states": torch.randn(1, 3, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([1.0]), "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip
    want = net(**given).sample
    lora_kernels.fuse(net, strict=True)
    torch.testing.assert_close(net(**given).sample, want, rtol=1e-4, atol=1e-5)
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(net))
