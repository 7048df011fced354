"""PEFT's layers over codes of torchao, HQQ, GPTQ and AWQ: one call of the kernels, judged against the weight that the
package dequantises to."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoraConfig  # noqa: E402
from support.coded_bases import KINDS, layer_over, make  # noqa: E402
from support.old_torch import compiles_whole_models  # noqa: E402
from support.peft_models import MaskOfSeed  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.core import dropout  # noqa: E402
from lora_kernels.nn.mixed import mixed  # noqa: E402
from lora_kernels.peft.codes import FusedCodes  # noqa: E402

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


def results(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return y and the gradients of x, A and B, in fp64."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    grads = {p: getattr(layer, p)["default"].weight.grad for p in ("lora_A", "lora_B")}
    return {each: t.detach().double().clone() for each, t in ({"y": y, "dx": x.grad} | grads).items()}


def truth(layer, w: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, keep=None) -> dict[str, torch.Tensor]:
    """Return the same, of the equation in fp64 over the dense `w`. `keep` is the dropout mask with its factor."""
    a, b = (getattr(layer, p)["default"].weight.detach().double().requires_grad_() for p in ("lora_A", "lora_B"))
    x = x.detach().double().requires_grad_()
    bias = layer.base_layer.bias
    dropped = x if keep is None else x * keep
    y = x @ w.t() + layer.scaling["default"] * (dropped @ a.t()) @ b.t() + (0 if bias is None else bias.double())
    y.backward(dy.double())
    return {"y": y.detach(), "dx": x.grad, "lora_A": a.grad, "lora_B": b.grad}


def judge(got, theirs, true, dtype, rms: float = 1.25) -> None:
    """Assert the judge's rule: an error at most 1.25 times PEFT's in the RMS and twice in the maximum."""
    for each, want in true.items():
        mine, other = got[each] - want, theirs[each] - want
        eps = torch.finfo(dtype).eps * want.abs().max()
        assert mine.isfinite().all(), each
        assert mine.square().mean().sqrt() <= rms * other.square().mean().sqrt() + 1e-3 * eps, each
        assert mine.abs().max() <= 2 * other.abs().max() + eps, each


def fused(model: nn.Module) -> FusedCodes:
    report = lora_kernels.fuse(model, strict=True)
    assert "around" not in report.fused["0"]
    layer = model[0]
    assert isinstance(layer, FusedCodes)
    return layer


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("M", [1, 40])
def test_values_and_gradients_are_as_near_to_the_weight_as_pefts(name, dtype, M):
    model = make(name, dtype=dtype)
    x, dy = torch.randn(M, 96).to(dtype), torch.randn(M, 64).to(dtype)
    theirs = results(model[0], x, dy)
    w = KINDS[name].dense(model[0].base_layer)
    layer = fused(model)
    # A row of 64 numbers says little about errors in the mean: twice is a bound for it.
    judge(results(layer, x, dy), theirs, truth(layer, w, x, dy), dtype, rms=1.25 if M > 1 else 2.0)
    assert layer.fused_calls == 1 and not layer.passed_over


def test_the_weight_has_the_packages_bits(name):
    """In fp32, and in what the package rounds to."""
    for dtype in (FP32, BF16, FP16):
        base = make(name, dtype=dtype)[0].base_layer
        layer = nn.Sequential(layer_over(base, KINDS[name]))
        q, _ = fused(layer).read_base(layer[0])
        got, want = q.dequantize(torch.float32), KINDS[name].dense(base)
        torch.testing.assert_close(got.double(), want, rtol=3 * 2**-24, atol=0)


def test_the_codes_are_the_packages_memory(name):
    layer = fused(make(name))
    q, _ = layer.read_base(layer)
    base = layer.base_layer
    inside = [getattr(base, key, None) for key in ("qweight", "W_q")]
    inside += [getattr(getattr(base, "weight", None), key, None) for key in ("qdata", "quantized_data")]
    assert q.codes.data_ptr() in [t.data_ptr() for t in inside if isinstance(t, torch.Tensor)]
    assert KINDS[name].note in lora_kernels.fuse(make(name)).fused["0"]


def test_every_instruction_set_computes_the_same(name):
    _C = pytest.importorskip("lora_kernels._C")
    before = _C.cpu_isa()
    try:
        for isa in _C.cpu_isas():
            _C.set_cpu_isa(isa)
            for M in (3, 33):
                model = make(name)
                x, dy = torch.randn(M, 96), torch.randn(M, 64)
                theirs, w = results(model[0], x, dy), KINDS[name].dense(model[0].base_layer)
                layer = fused(model)
                judge(results(layer, x, dy), theirs, truth(layer, w, x, dy), FP32, rms=2.0)
    finally:
        _C.set_cpu_isa(before)


SIZES = {
    "int8 by rows": (37, 23),
    "int8 per tensor": (37, 23),
    "int8 in groups": (1056, 3),
    "int4 with zeros": (1056, 3),
    "e4m3": (37, 23),
    "NF4Tensor": (80, 16),  # blocks of 64 straddle rows
    "hqq 4": (80, 24),
    "hqq 8": (40, 6),
    "gptq 4": (72, 136),  # a last group of 8 columns
    "gptq 4 act-order": (72, 264),
    "gptq 8": (36, 24),
    "awq 4": (33, 40),
}


def test_odd_sizes_without_a_bias(name):
    K, N = SIZES[name]
    model = make(name, K=K, N=N, bias=False)
    for shape in ((2, 17, K), (1, K), (0, K)):
        x, dy = torch.randn(shape), torch.randn(*shape[:-1], N)
        w = KINDS[name].dense(model[0].base_layer)
        want = truth(model[0], w, x, dy)
        got = results(fused(model), x, dy)
        for each, value in want.items():
            most = value.abs().max().item() if value.numel() else 0
            torch.testing.assert_close(got[each], value, rtol=0, atol=2e-5 * max(1, most))
        assert got["y"].shape == (*shape[:-1], N)
        lora_kernels.unfuse(model)


def test_dropout_has_our_mask(name, monkeypatch):
    model = make(name, lora_dropout=0.3).train()
    seeds = map(torch.tensor, itertools.count(7))
    monkeypatch.setattr("lora_kernels.ops.prepare.draw_seed", lambda device: next(seeds))
    x, dy = torch.randn(24, 96), torch.randn(24, 64)
    keep = dropout.dropout(torch.ones_like(x, dtype=torch.float64), 0.3, torch.tensor(7))
    w = KINDS[name].dense(model[0].base_layer)
    plain = make(name, lora_dropout=0.3).train()[0]
    plain.lora_dropout["default"] = MaskOfSeed(0.3, torch.tensor(7))
    layer = fused(model)
    judge(results(layer, x, dy), results(plain, x, dy), truth(layer, w, x, dy, keep), FP32, rms=2.0)
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and next(seeds) == 8


def test_adapters_in_16_bits_several_adapters_and_none(name):
    model = make(name, dtype=BF16, adapter_dtype=BF16)
    x = torch.randn(9, 96).to(BF16)
    before = model(x)
    layer = fused(model)
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.05 * before.abs().max().item())
    layer.update_layer("other", 3, lora_alpha=6, config=LoraConfig(r=3, init_lora_weights=False))
    layer.set_adapter(["default", "other"])
    both = model(x)
    layer.set_adapter("other")
    other = model(x)
    layer.enable_adapters(False)
    base = model(x)
    assert not torch.allclose(both, other) and not torch.allclose(other, base)
    w = KINDS[name].dense(layer.base_layer)
    plain = x.double() @ w.t() + layer.base_layer.bias.double()
    torch.testing.assert_close(base.double(), plain, rtol=0, atol=0.02 * plain.abs().max().item())


def test_autocast_gives_pefts_dtype(name):
    model = make(name)
    x, dy = torch.randn(40, 96), torch.randn(40, 64)
    w = KINDS[name].dense(model[0].base_layer)
    with torch.autocast("cpu", BF16):
        want = model(x)
        theirs = results(model[0], x, dy)
        lora_kernels.fuse(model, strict=True)
        got = model(x)
        assert got.dtype == want.dtype
        mine = results(model[0], x, dy)
    judge(mine, theirs, truth(model[0], w, x, dy), BF16, rms=1.3)
    assert model[0].fused_calls == 2


@pytest.mark.parametrize("kind", ["int8 by rows", "int8 in groups", "hqq 4", "hqq 8"])
def test_dora_over_the_codes_is_pefts(kind):
    model = make(kind, use_dora=True)
    with torch.no_grad():
        model[0].lora_magnitude_vector["default"].weight.mul_(1.2)
    x, dy = torch.randn(20, 96), torch.randn(20, 64)
    magnitude = model[0].lora_magnitude_vector["default"].weight
    theirs = results(model[0], x, dy) | {"m": magnitude.grad.clone()}
    got = results(fused(model), x, dy) | {"m": magnitude.grad.clone()}
    for each, value in theirs.items():
        torch.testing.assert_close(got[each], value, rtol=0, atol=1e-5 * value.abs().max().item())
    assert model[0].fused_calls == 1


def test_rows_with_adapters_of_their_own(name):
    model = make(name)
    layer = fused(model)
    layer.update_layer("other", 3, lora_alpha=6, config=LoraConfig(r=3, init_lora_weights=False))
    x = torch.randn(4, 96)
    want = []
    for adapter, row in zip(["default", "other", "default", None], x, strict=True):
        layer.enable_adapters(adapter is not None)
        if adapter:
            layer.set_adapter(adapter)
        want.append(model(row[None]))
    layer.enable_adapters(True)
    with mixed(model, ["default", "other", "default", None]):
        got = model(x)
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)
    given = model[0](x, adapter_names=["default", "other", "default", "__base__"])
    torch.testing.assert_close(given, got, rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_and_moves(name):
    K, N = (128, 128) if name == "NF4Tensor" else (96, 64)  # torchao copies it with blocks of 256 scales only
    model = make(name, K=K, N=N)
    layer, x = fused(model), torch.randn(5, K)
    want = model(x)
    pickled = [pickle.loads(pickle.dumps(model))] if name == "NF4Tensor" else []  # other bases do not pickle here
    for other in (copy.deepcopy(model), *pickled):
        assert torch.equal(other(x), want) and type(other[0]) is type(layer)
    assert torch.equal(model.to("cpu")(x), want)


def _written(model, other):
    """Writes to the parts of a weight, past the counters of versions."""
    for key in (
        "qdata",
        "scale",
        "zero_point",
        "quantized_data",
        "quantized_scalers",
        "quantization_factor",
        "scaler_mean",
    ):
        part = getattr(getattr(model[0].base_layer, "weight", None), key, None)
        if isinstance(part, torch.Tensor):
            part.data.copy_(getattr(other[0].base_layer.weight, key))
    for key, t in model[0].base_layer.named_buffers():
        t.data.copy_(other[0].base_layer.get_buffer(key))
    with torch.no_grad():
        model[0].base_layer.bias.copy_(other[0].base_layer.bias)


def _load(model, other):
    model.load_state_dict(other.state_dict())


def _load_in_inference_mode(model, other):
    with torch.inference_mode():
        model.load_state_dict(other.state_dict())


def _assign(model, other):
    model.load_state_dict(other.state_dict(), assign=True)


def _swap(model, other):
    if name := next((n for n in ("weight",) if n in model[0].base_layer._parameters), None):
        torch.utils.swap_tensors(getattr(model[0].base_layer, name), getattr(other[0].base_layer, name))
    else:
        for key, t in model[0].base_layer.named_buffers():
            t.copy_(other[0].base_layer.get_buffer(key))


@pytest.mark.parametrize("how", [_load, _load_in_inference_mode, _assign, _swap, _written])
@pytest.mark.parametrize("kind", ["int8 by rows", "int4 with zeros", "NF4Tensor", "gptq 4 act-order", "awq 4"])
def test_a_weight_that_is_loaded_or_swapped_is_read_again(kind, how):
    if how is _load_in_inference_mode and ("int" in kind or kind == "NF4Tensor"):
        pytest.skip("torchao's own load fails in inference mode")
    model = make(kind)
    x = torch.randn(5, 96)
    fused(model)
    model(x)
    torch.manual_seed(1)
    other = nn.Sequential(layer_over(KINDS[kind].make(96, 64, FP32, True), KINDS[kind]))
    w = KINDS[kind].dense(other[0].base_layer).clone()
    how(model, other)
    model[0].enable_adapters(True)
    with torch.no_grad():
        model[0].lora_B["default"].weight.zero_()
    got = model(x)
    want = x.double() @ w.t() + model[0].base_layer.bias.double()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())
    assert model[0].fused_calls == 2


def test_after_inference_mode_it_trains(name):
    model = make(name)
    layer, x = fused(model), torch.randn(5, 96)
    with torch.inference_mode():
        want = model(x)
    got = model(x)
    assert torch.equal(got, want)
    got.sum().backward()
    assert layer.lora_A["default"].weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["int8 by rows", "int4 with zeros", "e4m3", "NF4Tensor", "hqq 4"])
def test_merging_keeps_the_codes_and_puts_them_back(kind):
    model, x = make(kind), torch.randn(20, 96)
    layer = fused(model)
    before, base = model(x), layer.base_layer
    w = KINDS[kind].dense(base).clone()
    for _ in range(20):
        layer.merge()
        merged = model(x)
        layer.unmerge()
    torch.testing.assert_close(merged, before, rtol=0, atol=1e-5 * before.abs().max().item())
    assert layer.base_layer is base and torch.equal(KINDS[kind].dense(base), w) and torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ["int8 in groups", "hqq 4", "gptq 4"])
def test_a_group_is_one_call(kind):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = make(kind)[0], make(kind)[0]

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x).mul(2)

    torch.manual_seed(0)
    model, x = Two(), torch.randn(6, 96)
    want = model(x)
    report = lora_kernels.fuse(model, group=True)
    assert report.groups and len(report.fused) == 2
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@compiles_whole_models
@pytest.mark.parametrize("kind", ["int8 by rows", "int4 with zeros", "hqq 4", "gptq 4", "awq 4"])
def test_a_compiled_model_is_one_graph(kind):
    model, x = make(kind), torch.randn(6, 96)
    fused(model)
    want = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_read_is_computed_around_the_base():
    from support.coded_bases import Kind, hqq, torchao

    for build, peft_class in (
        (torchao("Int8DynamicActivationInt8WeightConfig"), ("torchao", "TorchaoLoraLinear")),
        (hqq(3), ("hqq", "HqqLoraLinear")),
        (hqq(4, axis=0), ("hqq", "HqqLoraLinear")),
    ):
        kind = Kind(build, None, peft_class, "")
        model = nn.Sequential(layer_over(build(96, 64, FP32, True), kind))
        x = torch.randn(5, 96)
        want = model(x)
        report = lora_kernels.fuse(model, strict=True)
        assert "around" in report.fused["0"]
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_hooks_and_other_dtypes_go_around_the_base(name):
    model = make(name)
    layer, x = fused(model), torch.randn(5, 96)
    want, seen = model(x), []
    handle = layer.base_layer.register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(model(x), want, rtol=2e-3, atol=2e-3 * want.abs().max().item())
    assert seen == [1] and layer.fused_calls == 2 and not layer.passed_over
    handle.remove()
    assert math.isfinite(model(x).sum()) and seen == [1]


@pytest.mark.slow
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptqmodels_own_layer_is_read_as_it_multiplies(bits, act_order):
    module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="gptqmodel is not installed")
    base = module.TorchLinear(
        bits=bits, group_size=32, sym=False, desc_act=act_order, in_features=96, out_features=64, bias=True,
        pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    _compare_with_gptqmodel(base, "gptq 4", act_order)


@pytest.mark.slow
def test_gptqmodels_own_layer_for_awq_is_read_as_it_multiplies():
    module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq", reason="gptqmodel is not installed")
    base = module.AwqTorchLinear(
        bits=4, group_size=32, sym=False, desc_act=False, in_features=96, out_features=64, bias=True,
        register_buffers=True,
    )  # fmt: skip
    _compare_with_gptqmodel(base, "awq 4", False)


def _compare_with_gptqmodel(base: nn.Module, kind: str, act_order: bool) -> None:
    torch.manual_seed(0)
    for packed in (base.qweight, base.qzeros):
        packed.copy_(torch.randint(-(2**31), 2**31, packed.shape).to(torch.int32))
    base.scales.copy_(torch.rand(base.scales.shape) / 50 + 0.005)
    if act_order:
        base.g_idx.copy_(base.g_idx[torch.randperm(96)])
    base.bias.normal_()
    base.post_init()
    model, x = nn.Sequential(layer_over(base.eval(), KINDS[kind])), torch.randn(7, 96).to(FP16)
    want = model(x)
    layer = fused(model)
    torch.testing.assert_close(model(x), want, rtol=0, atol=4e-3 * want.abs().max().item())
    assert layer.fused_calls == 1 and not layer.passed_over
    w = base._dequantize_weight_for_inference(x, dtype=FP16) if kind == "awq 4" else base.dequantize_weight()
    assert torch.equal(layer.read_base(layer)[0].dequantize(torch.float32), w.t().float())
