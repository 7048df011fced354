"""PEFT's DoRA over bitsandbytes' 4-bit and 8-bit weights has PEFT's results on the fused path, or nearer ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
from peft import PeftModel  # noqa: E402
from support.bnb_models import Net, Net8, make  # noqa: E402
from support.old_torch import compiles_whole_models  # noqa: E402
from support.peft_models import config, fused_layers, run, same, with_our_masks  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels import reference  # noqa: E402
from lora_kernels.core import accuracy  # noqa: E402
from lora_kernels.nn.mixed import mixed  # noqa: E402
from lora_kernels.quant.bnb import from_bnb  # noqa: E402

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def dora(net: nn.Module | None = None, **kwargs) -> PeftModel:
    """Return a model whose magnitudes are not the norms."""
    model = make(net, use_dora=True, **kwargs)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(0.5 + torch.rand(p.shape))
    return model


def served(model: nn.Module, calls: int = 1) -> None:
    assert all(layer.fused_calls == calls and not layer.passed_over for layer in fused_layers(model))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_values_and_gradients_are_pefts(quant_type, double):
    model, x = dora(Net(quant_type=quant_type, compress_statistics=double)), torch.randn(2, 5, 64)
    want = run(copy.deepcopy(model), x)
    assert len([name for name in want if "magnitude" in name]) == 2
    assert len(lora_kernels.fuse(model, strict=True).fused) == 2
    same(run(model, x), want, 1e-5)
    served(model)


@pytest.mark.parametrize("kwargs", [{"use_rslora": True}, {"bias": "all"}])
@pytest.mark.parametrize("net", [Net, Net8])
def test_settings_of_peft_are_honoured(net, kwargs):
    """In training mode on the CPU, bitsandbytes does not round x to 8 bits."""
    model, x = dora(net(), **kwargs), torch.randn(6, 64)
    want = run(copy.deepcopy(model), x)
    lora_kernels.fuse(model, strict=True)
    same(run(model, x), want, 1e-5)
    served(model)


@pytest.mark.parametrize("net", [Net, Net8])
def test_dropout_is_pefts_with_our_mask(net, monkeypatch):
    model, x = dora(net(), lora_dropout=0.3), torch.randn(3, 7, 64)
    plain, _ = with_our_masks(model, 0.3, monkeypatch)
    want = run(plain, x)
    lora_kernels.fuse(model, strict=True)
    same(run(model, x), want, 1e-5)
    served(model)


# --- 16 bits ---


def operands(layer) -> list[torch.Tensor]:
    return [
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.lora_magnitude_vector["default"].weight,
    ]


def results(layer, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Return y, dx, da, db and dm."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *operands(layer)], dy.to(y.dtype))]


def of_equation(layer, x, dy, dtype: torch.dtype, adapter_dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the same results from plain torch in these dtypes."""
    leaf = x.detach().to(dtype).requires_grad_()
    a, b, m = (t.detach().to(adapter_dtype).requires_grad_() for t in operands(layer))
    w, bias = from_bnb(layer.base_layer).dequantize(FP32).to(dtype), layer.base_layer.bias.detach().to(dtype)
    y = reference.dora_linear(leaf, w, a, b, m, scale=layer.scaling["default"], bias=bias)
    return [y.detach(), *torch.autograd.grad(y, [leaf, a, b, m], dy.to(y.dtype))]


def as_near_as_peft(model: PeftModel, x: torch.Tensor, inner: torch.dtype, autocast: torch.dtype | None = None) -> None:
    """Assert that the results have PEFT's dtypes and an RMS error of at most 1.25 times the larger of two errors:
    PEFT's, and that of plain torch in the dtypes of the computation."""
    dy = torch.randn(*x.shape[:-1], 128).to(x.dtype)
    plain = copy.deepcopy(model).base_model.model.up
    adapters = torch.promote_types(operands(plain)[0].dtype, inner)
    want, torch_s = of_equation(plain, x, dy, *[torch.float64] * 2), of_equation(plain, x, dy, inner, adapters)
    lora_kernels.fuse(model, strict=True)
    layer = model.base_model.model.up
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        theirs, ours = results(plain, x, dy), results(layer, x, dy)
    assert layer.fused_calls == 1 and not layer.passed_over, layer.passed_over
    for name, got, peers, own, exact in zip(("y", "dx", "da", "db", "dm"), ours, theirs, torch_s, want, strict=True):
        assert got.dtype == peers.dtype, name
        allowed = 1.25 * max(accuracy.rms(other.double() - exact) for other in (peers, own))
        assert accuracy.rms(got.double() - exact) <= allowed, (name, accuracy.rms(got.double() - exact), allowed)


@pytest.mark.parametrize(("x_dtype", "compute"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32), (BF16, None)])
@pytest.mark.parametrize("adapters", ["fp32", "same", "fp32 beside m"])
def test_sixteen_bits_are_as_near_as_peft(x_dtype, compute, adapters):
    """Without autocast_adapter_dtype PEFT makes m in the dtype of the weight that was quantised."""
    model = dora(Net(compute_dtype=compute))
    for name, module in model.named_modules():
        if "lora_" in name:
            module.to(x_dtype if adapters == "same" or ("magnitude" in name and "m" in adapters[5:]) else FP32)
    as_near_as_peft(model, torch.randn(96, 64).to(x_dtype), compute or x_dtype)


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("compute", [FP32, BF16])
def test_autocast_is_as_near_as_peft(x_dtype, compute):
    as_near_as_peft(dora(Net(compute_dtype=compute)), torch.randn(96, 64).to(x_dtype), compute, autocast=BF16)


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("autocast", [None, BF16])
def test_eight_bits_beside_a_16_bit_x_are_as_near_as_peft(x_dtype, autocast):
    as_near_as_peft(dora(Net8()), torch.randn(96, 64).to(x_dtype), autocast or x_dtype, autocast=autocast)


# --- files, merging, what is left to PEFT ---


def test_files_are_pefts(tmp_path):
    net, x = Net(), torch.randn(4, 64)
    model = dora(copy.deepcopy(net))
    lora_kernels.fuse(model, strict=True)
    y = model(x)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path, autocast_adapter_dtype=False).train()
    torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-4)
    lora_kernels.fuse(other, strict=True)
    assert torch.equal(other(x), y)


@pytest.mark.filterwarnings("ignore:.*rounding errors")
def test_merging_keeps_the_codes_and_unfuse_gives_back_pefts_forward():
    model, x = dora(), torch.randn(4, 64)
    plain = copy.deepcopy(model)
    lora_kernels.fuse(model, strict=True)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    served(model, 2)
    lora_kernels.unfuse(model)
    assert not fused_layers(model) and torch.equal(model(x), plain(x))


def test_what_is_not_served_says_why():
    model, x = dora(), torch.randn(4, 64)
    magnitude = model.base_model.model.up.lora_magnitude_vector["default"]
    handle = magnitude.register_forward_hook(lambda module, args, y: y)
    report = lora_kernels.fuse(model)
    assert len(report.fused) == 1 and all(
        "magnitude of adapter 'default' has hooks" in why for why in report.not_fused.values()
    )
    handle.remove()
    model.add_adapter("second", config(r=2, use_dora=True))
    lora_kernels.fuse(model)
    with mixed(model, ["default"] * 2 + ["second"] * 2), pytest.raises(RuntimeError, match="a DoRA adapter"):
        model(x)


def test_eight_bits_compute_more_than_once():
    """On a CPU PEFT 0.21.2 loses the scales of the weight in its first forward with DoRA, and its second one raises."""
    model, x = dora(Net8()), torch.randn(4, 64)
    want = run(copy.deepcopy(model), x)
    lora_kernels.fuse(model, strict=True)
    for _ in range(3):
        same(run(model, x), want, 1e-5)
    served(model, 3)
    model = dora(Net8())
    model(x)  # by PEFT
    lora_kernels.fuse(model, strict=True)
    assert torch.equal(model(x), model(x))
    served(model, 2)


def test_nothing_of_the_weights_size_is_saved():
    """With dropout PEFT saves the dequantised W."""
    model, x, (N, K) = dora(lora_dropout=0.1), torch.randn(4, 64, requires_grad=True), (128, 64)
    largest = []
    for layer in (copy.deepcopy(model).base_model.model.up, model.base_model.model.up):
        if largest:
            lora_kernels.fuse(model, strict=True)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            layer(x)
        largest.append(max(sizes))
    assert largest == [N * K, N * K // 2]  # these are the codes


@compiles_whole_models
def test_a_model_compiles_into_one_graph():
    model, x = dora(), torch.randn(4, 64)
    lora_kernels.fuse(model, strict=True)
    want = run(model, x)
    model.compile(backend="aot_eager", fullgraph=True)
    same(run(model, x), want)
