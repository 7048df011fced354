"""`QuantizedLoRALinear` and `apply_lora(quant=...)`, which are QLoRA for plain PyTorch models, train, merge and
load."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import FusedLoRALinear, load_adapter, merge_and_unload, save_adapter, trainable_parameters
from lora_kernels.models.inject import apply_lora
from lora_kernels.nn.quantized import QuantizedLoRALinear, quantized_linear
from lora_kernels.quant.weight import dequantize_weight, quantize_weight
from lora_kernels.testing.judge import Problem, evaluate, judge

FORMATS = {
    "nf4": {"quant": "nf4"},
    "nf4 double": {"quant": "nf4", "double_quant": True, "blocksize": 128},
    "fp4": {"quant": "fp4", "blocksize": 32},
    "int8": {"quant": "int8"},
    "fp8": {"quant": "fp8"},
}
SCALINGS = ("tensor", "row", "block")


@pytest.fixture(params=FORMATS)
def settings(request) -> dict:
    return FORMATS[request.param]


def trained(base: nn.Linear | None = None, **kwargs) -> QuantizedLoRALinear:
    """Return a layer whose adapter is not zero, over `base` or a linear from 72 to 40."""
    layer = FusedLoRALinear.from_linear(base or nn.Linear(72, 40), **({"r": 4} | kwargs))
    assert type(layer) is QuantizedLoRALinear
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def stored(layer: QuantizedLoRALinear) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in layer.quantized_weight().tensors]


def same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.element_size() == b.element_size() and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip((t.reshape(-1) for t in one), (t.reshape(-1) for t in other), strict=True)
    )


def dense(layer: QuantizedLoRALinear) -> torch.Tensor:
    return dequantize_weight(layer.quantized_weight(), torch.float32)


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "N", "K"), [(5, 40, 24), (160, 144, 136)])
def test_the_judge_accepts_values_and_gradients(settings, dtype, M, N, K, backend, poison):
    base = nn.Linear(K, N, dtype=dtype)
    layer = trained(base, backend=backend, r=8, **settings)
    layer.bias.requires_grad_(True)
    x, dy = torch.randn(M, K, dtype=dtype), torch.randn(M, N, dtype=dtype)
    q = Problem(x, dense(layer), layer.lora_A, layer.lora_B, layer.bias, dy, layer.scaling, 0.0, None)
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    got = {"y": y.detach(), "dx": x.grad, "da": layer.lora_A.grad, "db": layer.lora_B.grad, "dbias": layer.bias.grad}
    for verdict in judge(got, q, plain=evaluate(replace(q, w=q.w.to(dtype)))):
        assert verdict.fault is None, verdict.fault


def test_a_fresh_module_computes_its_quantised_base(settings):
    base, x = nn.Linear(72, 40), torch.randn(5, 72)
    layer = FusedLoRALinear.from_linear(base, **settings)
    torch.testing.assert_close(layer(x), F.linear(x, dense(layer), base.bias))
    torch.testing.assert_close(quantized_linear(x, layer.quantized_weight(), None), F.linear(x, dense(layer)))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert layer.weight_dtype == layer.lora_A.dtype == torch.float32 and layer.bias is base.bias
    assert not FusedLoRALinear.from_linear(base.eval(), **settings).training


def test_scaling_may_change_and_dropout_acts_only_while_training():
    layer, x = trained(quant="nf4", lora_dropout=0.5), torch.randn(5, 72)
    assert not torch.equal(layer(x), layer(x))
    y = layer.eval()(x)
    assert torch.equal(layer(x), y)
    low = layer.scaling * (x @ layer.lora_A.t() @ layer.lora_B.t())
    torch.testing.assert_close(y, F.linear(x, dense(layer), layer.bias) + low)
    layer.scaling = 0.0
    torch.testing.assert_close(layer(x), F.linear(x, dense(layer), layer.bias))


def test_autocast_gives_its_dtype_and_checkpointing_the_same_gradients(settings):
    layer, x = trained(**settings), torch.randn(5, 72)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=16 * 2**-8)
    layer(x).square().sum().backward()
    want = layer.lora_A.grad.clone()
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.lora_A.grad, want)


@pytest.mark.parametrize("merged", [False, True])
def test_the_layer_compiles_into_one_graph_with_the_same_bits(settings, merged):
    layer, x = trained(**settings), torch.randn(5, 72, requires_grad=True)
    if merged:
        layer.merge(lossy=True)
        layer.eval()
    want = layer(x)
    (dx,) = torch.autograd.grad(want.sum(), x)
    torch._dynamo.reset()
    got = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(got, want) and torch.equal(torch.autograd.grad(got.sum(), x)[0], dx)


# --- merging ---


@pytest.mark.parametrize("scaling", [4.0, -1e-3])
def test_merging_reports_its_cost_and_unmerging_restores_every_bit(settings, scaling):
    layer, x = trained(**settings), torch.randn(5, 72)
    layer.scaling = scaling
    w = dense(layer).double() + scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    before, y = stored(layer), layer(x)
    report = layer.merge(lossy=True)
    error, update = (dense(layer).double() - w).norm() / w.norm(), scaling * layer.lora_B @ layer.lora_A
    assert report.error == pytest.approx(error.item(), rel=1e-4)
    assert report.update == pytest.approx((update.double().norm() / w.norm()).item(), rel=1e-4)
    assert layer.merged and "merged" in repr(layer)
    assert layer.merge(lossy=True) == report, "merging twice does nothing"
    torch.testing.assert_close(layer.eval()(x), F.linear(x, dense(layer), layer.bias))
    assert torch.equal(layer.to_linear().weight, w.float()), "to_linear starts from the unmerged weight"
    layer.unmerge()
    assert same_bits(stored(layer), before) and torch.equal(layer(x), y) and not layer.merged
    layer.unmerge()


def test_merging_is_refused_without_lossy_and_for_a_result_that_is_not_finite(settings):
    layer = trained(**settings)
    before = stored(layer)
    with pytest.raises(ValueError, match=r"loses part of the update.*lossy=True.*to_linear"):
        layer.merge()
    layer.lora_B.data[3, 1] = torch.inf
    for attempt in (lambda: layer.merge(lossy=True), layer.to_linear):
        with pytest.raises(ValueError, match="not finite"):
            attempt()
    assert not layer.merged and same_bits(stored(layer), before)


def test_training_a_merged_module_warns():
    layer = trained(quant="nf4")
    layer.merge(lossy=True)
    with pytest.warns(UserWarning, match="this QuantizedLoRALinear is merged.*unmerge"):
        layer(torch.randn(2, 72))
    before = layer.lora_B.clone()
    layer.reset_adapter()
    assert not layer.merged and not torch.equal(layer.lora_B, before)


def test_to_linear_gives_a_dense_layer_of_its_own_memory(settings):
    layer, x = trained(**settings), torch.randn(5, 72)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and linear.weight.dtype == torch.float32
    torch.testing.assert_close(linear(x), layer(x))
    assert linear.bias.data_ptr() != layer.bias.data_ptr()


# --- moving and copying ---


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversions_leave_codes_and_scales_alone(settings, merged, dtype):
    layer = trained(**settings)
    if merged:
        layer.merge(lossy=True)
    before = stored(layer)
    assert layer.to(dtype) is layer and same_bits(stored(layer), before)
    assert {layer.lora_A.dtype, layer.lora_B.dtype, layer.bias.dtype, layer.weight_dtype} == {dtype}
    layer.unmerge()
    assert layer.weight_dtype == dtype and layer.to_linear().weight.dtype == dtype
    assert layer(torch.randn(2, 72, dtype=dtype)).dtype == dtype
    assert layer.half().float().lora_A.dtype == torch.float32


def test_a_layer_moves_to_the_meta_device_and_is_filled_from_a_state_dict(settings):
    layer = trained(**settings)
    state = layer.state_dict()
    empty = copy.deepcopy(layer).to("meta")
    assert {t.device.type for t in empty.quantized_weight().tensors} == {"meta"}
    assert [t.dtype for t in empty.quantized_weight().tensors] == [t.dtype for t in stored(layer)]
    assert empty(torch.empty(3, 72, device="meta")).shape == (3, 40)
    empty.load_state_dict(state, assign=True)
    x = torch.randn(3, 72)
    assert torch.equal(empty(x), layer(x))
    filled = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    filled.load_state_dict(state)
    assert torch.equal(filled(x), layer(x))


@pytest.mark.parametrize("merged", [False, True])
def test_a_deepcopy_and_an_unpickled_module_compute_the_same(settings, merged):
    layer, x = trained(**settings).eval(), torch.randn(3, 72)
    before = stored(layer)
    if merged:
        layer.merge(lossy=True)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert other.merged == merged and torch.equal(other(x), layer(x))
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        other.unmerge()
        assert same_bits(stored(other), before)


# --- state_dict ---


def through_a_file(state: dict[str, torch.Tensor], how: str, path) -> dict[str, torch.Tensor]:
    if how == "torch":
        torch.save(state, path)
        return torch.load(path, weights_only=True)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, path)
    return safetensors.load_file(path)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", ["torch", "safetensors"])
def test_a_state_dict_gives_the_same_layer_through_a_file(settings, merged, how, tmp_path):
    layer, other, x = trained(**settings), trained(**settings), torch.randn(3, 72)
    y, before = layer(x), stored(layer)
    if merged:  # the state_dict is that of the unmerged layer
        layer.merge(lossy=True)
    model = nn.Sequential(other)
    model.load_state_dict(through_a_file(nn.Sequential(layer).state_dict(), how, tmp_path / "state"))
    assert same_bits(stored(other), before) and torch.equal(other(x), y)


def test_a_dense_checkpoint_is_quantised_when_it_is_loaded(settings):
    base, x = nn.Linear(72, 40), torch.randn(3, 72)
    model, want = nn.Sequential(trained(**settings)), FusedLoRALinear.from_linear(base, **settings)
    adapter = model[0].lora_B.clone()
    model.load_state_dict({f"0.{name}": value for name, value in base.state_dict().items()})
    assert same_bits(stored(model[0]), stored(want)) and torch.equal(model[0].lora_B, adapter)
    assert torch.equal(model[0].bias, base.bias)
    model[0].scaling = 0.0
    torch.testing.assert_close(model(x), want(x))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_fp8_keeps_its_scaling_when_quantised_again(scaling):
    w = torch.randn(200, 300) * 0.05
    layer = QuantizedLoRALinear.over(quantize_weight(w, "fp8", scaling=scaling), r=2)
    layer.load_state_dict({"weight": w * 2})
    assert same_bits(stored(layer), list(quantize_weight(w * 2, "fp8", scaling=scaling).tensors))
    report = layer.merge(lossy=True)
    assert report.update == 0 and report.error < 2**-4


def test_an_adapter_alone_is_loaded_if_not_strict():
    layer, other = trained(quant="nf4"), trained(quant="nf4")
    before = stored(other)
    other.load_state_dict({name: getattr(layer, name) for name in ("lora_A", "lora_B")}, strict=False)
    assert torch.equal(other.lora_B, layer.lora_B) and same_bits(stored(other), before)
    with pytest.raises(RuntimeError, match="weight_scales"):
        other.load_state_dict({name: getattr(layer, name) for name in ("lora_A", "lora_B")})


def changed(state: dict[str, torch.Tensor], **values) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in state.items()} | values
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: trained(quant="fp4").state_dict(), r"in format 'fp4 64', this module's in 'nf4 64'"),
        (lambda s: trained(quant="nf4", blocksize=128).state_dict(), r"in format 'nf4 128', this module's in 'nf4 64'"),
        (lambda s: trained(quant="nf4", double_quant=True).state_dict(), r"in format 'nf4 64 double_quant'"),
        (lambda s: changed(s, weight_scales=None), "is there, but not weight_scales"),
        (lambda s: changed(s, weight_format=None), r"must be dense, \(40, 72\).*int8"),
        (lambda s: changed(s, weight_format=None, weight=None), "come in parts with weight_format.*got nothing"),
        (lambda s: changed(s, weight=s["weight"][:, 1:]), r"weight is \(40, 35\), here \(40, 36\)"),
        (lambda s: changed(s, weight=s["weight"].float()), r"weight is torch.float32, here torch.int8"),
        (lambda s: changed(s, weight_scales=s["weight_scales"].half()), r"weight_scales is torch.float16"),
        (lambda s: changed(s, bias=s["bias"][1:]), r"bias is \(39,\), here \(40,\)"),
        (lambda s: changed(s, lora_B=s["lora_B"][1:]), r"lora_B is \(39, 4\), here \(40, 4\)"),
        (lambda s: trained(quant="nf4", r=5).state_dict(), "Build it with r=5"),
        (lambda s: {"weight": torch.full((40, 72), torch.nan), "bias": s["bias"]}, r"(?i)nan"),
        (lambda s: {"weight": torch.randn(40, 70), "bias": s["bias"]}, r"must be dense, \(40, 72\).*\(40, 70\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, match):
    layer = trained(quant="nf4")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    source = nn.Linear(72, 40)
    bad = change(trained(source, quant="nf4").state_dict())
    with pytest.raises(ValueError, match=match):
        layer.load_state_dict(bad)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_loading_into_a_merged_module_is_refused():
    layer = trained(quant="nf4")
    layer.merge(lossy=True)
    with pytest.raises(ValueError, match=r"unmerge\(\) before loading"):
        layer.load_state_dict(trained(quant="nf4").state_dict())


# --- models ---


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(up=nn.Linear(24, 96), act=nn.Tanh(), down=nn.Linear(96, 24, bias=False), head=nn.Linear(24, 4))
    )


def test_a_model_trains_and_its_base_keeps_every_bit(settings):
    model = net()
    report = apply_lora(model, r=4, lora_alpha=16, exclude_modules=["head"], **settings)
    layers = [model.up, model.down]
    assert [type(layer) for layer in layers] == [QuantizedLoRALinear] * 2 and type(model.head) is nn.Linear
    before = [stored(layer) for layer in layers]
    x, target = torch.randn(64, 24), torch.randn(64, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(same_bits(stored(layer), old) for layer, old in zip(layers, before, strict=True))
    dense_bytes, packed_bytes = report.quantised
    assert dense_bytes == 2 * 24 * 96 * 4 and packed_bytes == sum(t.nbytes for part in before for t in part)
    assert f"their weights: 18,432 → {packed_bytes:,} bytes" in str(report) and f"  {settings['quant']}" in str(report)
    assert trainable_parameters(model).total == sum(p.numel() for p in net().parameters()) + 2 * 4 * (24 + 96)


def test_merge_and_unload_gives_dense_layers(settings):
    model, x = net(), torch.randn(5, 24)
    apply_lora(model, r=4, **settings)
    nn.init.normal_(model.up.lora_B, std=0.3)
    y = model(x)
    assert merge_and_unload(model) is model
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), y)


def test_adapter_files_hold_a_and_b_only(settings, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = net(), torch.randn(5, 24)
    apply_lora(model, r=4, **settings)
    nn.init.normal_(model.up.lora_B, std=0.3)
    save_adapter(model, tmp_path)
    keys = set(safetensors.load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {f"base_model.model.{n}.lora_{p}.weight" for n in ("up", "down", "head") for p in "AB"}
    other = net()
    apply_lora(other, r=4, **settings)
    load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))
    load_adapter(plain := net(), tmp_path)  # a dense base takes the adapter too
    torch.testing.assert_close(plain.up.lora_B, model.up.lora_B)


def test_from_bnb_shares_the_weight_and_computes_the_same():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    linear, x = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4").to("cpu"), torch.randn(3, 64)
    layer = FusedLoRALinear.from_bnb(linear, r=4)
    assert layer.weight.data_ptr() == linear.weight.data_ptr() and layer.format == "nf4"
    torch.testing.assert_close(layer(x), linear(x))
    eight = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu").eval()
    layer = QuantizedLoRALinear.from_bnb(eight, dtype=torch.float32, r=4)
    assert layer.format == "int8" and layer.lora_A.dtype == torch.float32 and not layer.training
    torch.testing.assert_close(layer(x), eight.train()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_bias_of_another_dtype_is_converted_as_bitsandbytes_does(kind, dtype):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    how = {"compute_dtype": dtype} if kind == "Linear4bit" else {"has_fp16_weights": False}
    linear = getattr(bnb.nn, kind)(64, 32, **how).to("cpu")
    linear.bias.data = torch.randn(32, dtype=torch.float32 if dtype != torch.float32 else torch.bfloat16)
    given, x = linear.bias.detach().clone(), torch.randn(40, 64, dtype=dtype)
    layer = FusedLoRALinear.from_bnb(linear, r=4, dtype=dtype)
    layer.bias.requires_grad_(True)
    y = layer(x)
    y.sum().backward()
    assert layer.bias.dtype == given.dtype and torch.equal(layer.bias, given), "the parameter stays as it is"
    assert layer.bias.grad.dtype == given.dtype and torch.all(layer.bias.grad == 40)
    truth = x.double() @ dense(layer).double().t() + given.to(dtype).double()
    theirs = linear(x)  # converts its bias for good
    rounded = torch.finfo(dtype).eps * truth.abs().max()
    assert y.dtype == dtype and (y - truth).abs().max() <= (theirs - truth).abs().max() + rounded
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    merged = layer.to_linear()
    assert merged.bias.dtype == merged.weight.dtype == dtype and merged(x).dtype == dtype
    layer.merge(lossy=True)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float32])
def test_a_quantised_layer_with_a_bias_takes_an_x_of_any_dtype(settings, other):
    layer = trained(nn.Linear(72, 40), **settings)
    assert layer(torch.randn(3, 72, dtype=other)).dtype == other
