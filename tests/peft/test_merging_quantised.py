"""Merging over weights of 4 and 8 bits: a dense weight stands beside the codes, and the very codes come back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")
from support.merge_models import K, N, Net, is_rounded_once, over, quantised, randomised  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.quant.bnb import from_bnb  # noqa: E402
from lora_kernels.quant.weight import quantize_like  # noqa: E402

FORMATS = ("nf4", "fp4", "int8")
every_format = pytest.mark.parametrize("format", FORMATS)
pytestmark = pytest.mark.filterwarnings("ignore:.*[Aa]lready:UserWarning", "ignore:.*rounding errors", "ignore:MatMul8")


def codes_of(layer) -> tuple:
    """Return the objects of a quantised base, and copies of their bits."""
    base = layer.base_layer
    weight = base.weight
    state = getattr(weight, "quant_state", None)
    scales = state.absmax if state is not None else (weight.SCB if weight.SCB is not None else base.state.SCB)
    return (base, weight, state, scales), [weight.data.clone(), scales.clone()]


def has_codes(layer, before) -> bool:
    objects, bits = codes_of(layer)
    same = all(a is b for a, b in zip(objects, before[0], strict=True))
    return same and all(torch.equal(a, b) for a, b in zip(bits, before[1], strict=True))


def exact(model) -> torch.Tensor:
    """Return W + s·B A in fp64, W as the codes stand for it."""
    layer = model.base_model.model.layer
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return from_bnb(layer.base_layer).dequantize(torch.float32).double() + layer.scaling["default"] * (b @ a)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
def test_a_dense_weight_stands_beside_the_codes_and_they_come_back(format, dtype, nested):
    if nested and format == "int8":
        pytest.skip("int8 has one level of scales")
    model, x = over(format, dtype, nested), torch.randn(3, K, dtype=dtype)
    lora_kernels.fuse(model, strict=True)
    layer = model.base_model.model.layer
    want, before, sums = model(x), codes_of(layer), exact(model).detach()
    model.merge_adapter()
    dense = model.get_submodule("base_model.model.layer.base_layer")
    assert dense.weight.dtype == dtype and dense.weight.shape == (N, K) and is_rounded_once(dense.weight.detach(), sums)
    assert set(model.state_dict()) >= {"base_model.model.layer.base_layer." + name for name in ("weight", "bias")}
    assert not any("absmax" in key or "SCB" in key for key in model.state_dict())
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    got = model(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert lora_kernels.merged_bytes(model) == dense.weight.nbytes
    model.unmerge_adapter()
    assert has_codes(layer, before) and torch.equal(model(x), want)


@every_format
@pytest.mark.parametrize("first", [False, True])
def test_merge_and_unload_quantises_the_sum_once_and_says_the_loss(format, first):
    model, x = over(format), torch.randn(3, K)
    lora_kernels.fuse(model, strict=True)
    base, sums = model.base_model.model.layer.base_layer, exact(model).detach()
    kind, before = type(base.weight), from_bnb(base)
    losses = lora_kernels.merge_losses(model)
    if first:
        model.merge_adapter()
    with pytest.warns(UserWarning, match=r"rounding errors.*merge_losses"):
        merged = model.merge_and_unload()
    assert merged.layer is base and type(base.weight) is kind and not base.weight.requires_grad
    after = from_bnb(base)
    assert (after.format, after.shape, after.dtype) == (before.format, before.shape, before.dtype)
    rounded = sums.half() if format == "int8" else sums.float()
    want = quantize_like(rounded, before)
    assert (after.codes == want.codes).float().mean() > 0.999
    got = after.dequantize(torch.float32).double()
    (report,) = losses.values()
    assert list(losses) == ["base_model.model.layer"]
    assert report.error == pytest.approx(((got - sums).norm() / sums.norm()).item(), rel=0.01)
    update = (sums - before.dequantize(torch.float32).double()).norm() / sums.norm()
    assert report.update == pytest.approx(update.item(), rel=1e-4)
    torch.testing.assert_close(
        merged.train()(x).double(), x.double() @ got.T + base.bias.double(), rtol=1e-4, atol=1e-4
    )


@every_format
def test_unload_without_merging_gives_the_codes_and_after_merging_the_sum(format):
    model = over(format)
    lora_kernels.fuse(model)
    before = codes_of(model.base_model.model.layer)
    plain = model.unload()
    assert plain.layer is before[0][0] and plain.layer.weight is before[0][1]


@every_format
def test_settings_of_now_go_to_the_base_that_comes_back(format):
    model, x = over(format), torch.randn(3, K)
    lora_kernels.fuse(model)
    layer = model.base_model.model.layer
    base, calls = layer.base_layer, []
    handle = base.register_forward_hook(lambda *_: calls.append(1))
    model.merge_adapter()
    model.train()
    assert model(x).requires_grad is False and calls == [1], "hooks of the base are those of what stands there"
    y = model(x.requires_grad_())
    y.sum().backward()
    w = layer.base_layer.weight.detach()
    torch.testing.assert_close(x.grad, w.sum(0).expand(3, -1))
    layer.base_layer.bias.data.add_(1)
    model.unmerge_adapter()
    handle.remove()
    assert layer.base_layer is base and base.training and base.bias.data.min() > 0.8


@every_format
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_changes_no_dtype_under_autocast(format, training, dtype):
    model, x = over(format, dtype).train(training), torch.randn(3, K, dtype=dtype)
    lora_kernels.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        model.merge_adapter()
        assert model(x).dtype == want.dtype


@every_format
def test_a_model_that_was_pickled_is_merged(format):
    model, x = over(format), torch.randn(3, K)
    lora_kernels.fuse(model)
    want = model(x)
    model = pickle.loads(pickle.dumps(model))
    base = model.base_model.model.layer.base_layer
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
    assert model.base_model.model.layer.base_layer is base and torch.equal(model(x), want)


@every_format
def test_a_merged_model_is_copied_moved_and_fused_again(format):
    model, x = over(format), torch.randn(3, K)
    lora_kernels.fuse(model)
    layer, want = model.base_model.model.layer, model(x)
    before = codes_of(layer)
    model.merge_adapter()
    report = lora_kernels.fuse(model)
    assert list(report.fused) == ["base_model.model.layer"]
    other = copy.deepcopy(model)
    other.to("cpu")
    for each in (other, model):
        each.unmerge_adapter()
        assert torch.equal(each(x), want)
    assert has_codes(layer, before)
    model.merge_adapter()
    model.base_model.model.layer.base_layer.weight.data.add_(1)
    with pytest.raises(ValueError, match="was written to"):
        model.unmerge_adapter()
    with pytest.raises(ValueError, match=r"quantised.*keep=False"):
        lora_kernels.unmerge_written(model, keep=True)
    assert lora_kernels.unmerge_written(model, keep=False) == ["base_model.model.layer"]
    assert has_codes(layer, before) and torch.equal(model(x), want)


@every_format
def test_a_bias_of_the_adapter_is_merged_with_its_scaling(format):
    model, x = over(format, lora_bias=True), torch.randn(3, K)
    lora_kernels.fuse(model)
    layer = model.base_model.model.layer
    want, bias = model(x), layer.base_layer.bias
    bits = bias.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=2e-4)
    assert not torch.equal(layer.base_layer.bias, bits)
    model.unmerge_adapter()
    assert layer.base_layer.bias is bias and torch.equal(bias, bits)


@every_format
@pytest.mark.parametrize("how", ["dora", "vera", "adalora"])
def test_other_methods_over_quantised_weights_are_merged_as_exactly(format, how):
    x = torch.randn(3, K)
    if how == "dora":
        model = over(format, use_dora=True)
    elif how == "vera":
        if format == "fp4":
            pytest.skip("as nf4")
        model = randomised(peft.get_peft_model(Net(quantised(format)), peft.VeraConfig(r=8, target_modules=["layer"])))
    else:
        net = Net(quantised(format))
        setattr(net, "is_loaded_in_8bit" if format == "int8" else "is_loaded_in_4bit", True)
        config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["layer"])
        model = randomised(peft.get_peft_model(net, config))
    assert not lora_kernels.fuse(model).not_fused
    layer = model.train().base_model.model.layer  # in evaluation the base's own forward packs its codes anew
    want, before = model(x), codes_of(layer)
    model.merge_adapter()
    assert type(layer.base_layer).__name__ == "MergedLinear"
    torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        model(x)
    assert not layer.merged and has_codes(layer, before) and torch.equal(model(x), want)


@pytest.mark.filterwarnings("ignore:.*rounding errors")
def test_a_weight_that_cannot_be_read_is_merged_by_peft():
    net = Net(bnb.nn.Linear4bit(K, 32, compute_dtype=torch.float32, quant_type="nf4").to("cpu"))
    net.layer.weight.quant_state.code = net.layer.weight.quant_state.code * 2  # a table of its own
    net.is_loaded_in_4bit = True
    lora_kernels.enable()  # which does not look at the weight
    try:
        model = randomised(peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["layer"])))
    finally:
        lora_kernels.disable()
    layer = model.base_model.model.layer
    model.merge_adapter()
    assert layer.merged and type(layer.base_layer) is bnb.nn.Linear4bit and lora_kernels.merged_bytes(model) == 0
    model.unmerge_adapter()
    assert not layer.merged
