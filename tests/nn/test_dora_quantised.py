"""`QuantizedLoRALinear` with DoRA: its first magnitude, merging, loading, copies and adapter files."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.judging import layer_results
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    FusedLoRALinear,
    QuantizedLoRALinear,
    apply_lora,
    load_adapter,
    merge_and_unload,
    quantize_weight,
    reference,
    save_adapter,
)
from lora_kernels.ops.dora_norm import weight_norm

FORMATS = {
    "nf4": {"quant": "nf4"},
    "fp4 double": {"quant": "fp4", "double_quant": True, "blocksize": 128},
    "int8": {"quant": "int8"},
    "fp8": {"quant": "fp8"},
}


@pytest.fixture(params=FORMATS)
def settings(request) -> dict:
    return FORMATS[request.param]


def make(base: nn.Linear | None = None, **kwargs) -> QuantizedLoRALinear:
    layer = FusedLoRALinear.from_linear(base or nn.Linear(72, 40), use_dora=True, **({"r": 4, "quant": "nf4"} | kwargs))
    assert type(layer) is QuantizedLoRALinear and layer.use_dora
    return layer


def trained(base: nn.Linear | None = None, **kwargs) -> QuantizedLoRALinear:
    """Return a layer whose adapter is not zero and whose magnitude is not the norm."""
    layer = make(base, **kwargs)
    nn.init.normal_(layer.lora_B, std=0.3)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(0.5 + torch.rand(layer.out_features))
    return layer


def dense(layer: QuantizedLoRALinear) -> torch.Tensor:
    return layer.quantized_weight().dequantize(torch.float32)


def truth(layer: QuantizedLoRALinear, x: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
    """Return y in fp64."""
    own = dense(layer) if w is None else w
    a, b, m = (t.detach().double() for t in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    bias = None if layer.bias is None else layer.bias.detach().double()
    return reference.dora_linear(x.double(), own.double(), a, b, m, scale=layer.scaling, bias=bias)


@pytest.mark.parametrize("dtypes", [("float32", None), ("bfloat16", None), ("bfloat16", "bfloat16")], ids=str)
def test_a_fresh_module_computes_its_quantised_base(settings, dtypes):
    """d is exactly 1."""
    dtype, adapter = getattr(torch, dtypes[0]), dtypes[1] and getattr(torch, dtypes[1])
    base, x = nn.Linear(72, 40, dtype=dtype), torch.randn(5, 72, dtype=dtype)
    layer = make(base, adapter_dtype=adapter, **settings)
    m = layer.lora_magnitude_vector
    assert m.requires_grad and m.dtype == layer.lora_A.dtype
    norm = weight_norm(layer.quantized_weight(), layer.lora_A, layer.lora_B, layer.scaling, m)
    assert torch.equal(m, norm)
    torch.testing.assert_close(m.float(), dense(layer).norm(dim=1), rtol=2 * torch.finfo(m.dtype).eps, atol=0)
    lora = FusedLoRALinear.from_linear(base, r=4, adapter_dtype=adapter, **settings)
    torch.testing.assert_close(layer(x), lora(x))
    assert "use_dora=True" in repr(layer) and "quant=" in repr(layer)


def test_values_and_gradients_are_those_of_the_dequantised_weight(settings):
    layer, x = trained(**settings), torch.randn(6, 72)
    torch.testing.assert_close(layer(x).double(), truth(layer, x), rtol=1e-5, atol=1e-5)
    plain = FusedLoRALinear.from_linear(nn.Linear(72, 40), r=4, use_dora=True)
    plain.load_state_dict(
        {**{n: p for n, p in layer.state_dict().items() if not n.startswith("weight")}, "weight": dense(layer)}
    )
    for got, want in zip(layer_results(layer, x), layer_results(plain, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {
        "lora_A", "lora_B", "lora_magnitude_vector",
    }  # fmt: skip


def test_the_first_call_of_a_process_has_the_right_norm():
    """The native kernels must know the levels of nf4 and fp4 before any product has been computed."""
    code = (
        "import torch, lora_kernels\n"
        "for quant in ('nf4', 'fp4'):\n"
        "    layer = lora_kernels.FusedLoRALinear.from_linear(torch.nn.Linear(72, 40), quant=quant, use_dora=True)\n"
        "    want = layer.quantized_weight().dequantize().norm(dim=1)\n"
        "    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), want)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_over_and_from_bnb_make_such_layers():
    bias = nn.Parameter(torch.randn(40))
    layer, x = (
        QuantizedLoRALinear.over(quantize_weight(torch.randn(40, 72), "int8"), bias, use_dora=True),
        torch.randn(3, 72),
    )
    torch.testing.assert_close(layer(x), F.linear(x, dense(layer), bias), rtol=1e-4, atol=1e-4)
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for base in (bnb.nn.Linear4bit(64, 32), bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)):
        layer, x = FusedLoRALinear.from_bnb(base.to("cpu"), use_dora=True, r=2), torch.randn(3, 64)
        torch.testing.assert_close(layer(x), F.linear(x, dense(layer), base.bias.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["loftq", "lq_lora"])
def test_an_initialisation_that_splits_w_starts_with_d_of_one(init):
    layer, x = make(init=init), torch.randn(3, 72)
    assert layer.lora_B.count_nonzero()
    whole = dense(layer) + layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.lora_magnitude_vector, whole.norm(dim=1))
    torch.testing.assert_close(layer(x), F.linear(x, whole, layer.bias), rtol=1e-4, atol=1e-5)


# --- merging ---


def test_merge_says_what_it_loses_and_unmerge_restores_every_bit(settings):
    layer, x = trained(**settings).eval(), torch.randn(3, 72)
    before, y = [t.clone() for t in layer.quantized_weight().tensors], layer(x)
    w = dense(layer).double()
    whole = w + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    exact = (layer.lora_magnitude_vector.double() / whole.norm(dim=1))[:, None] * whole
    with pytest.raises(ValueError, match="lossy=True"):
        layer.merge()
    linear = layer.to_linear()
    torch.testing.assert_close(linear.weight.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(linear(x), y, rtol=1e-4, atol=1e-4)
    report = layer.merge(lossy=True)
    merged = dense(layer).double()
    assert layer.merged
    assert report.error == pytest.approx(((merged - exact).norm() / exact.norm()).item(), rel=1e-5)
    assert report.update == pytest.approx(((exact - w).norm() / exact.norm()).item(), rel=1e-5)
    torch.testing.assert_close(layer(x), F.linear(x, dense(layer), layer.bias))
    assert torch.equal(layer.to_linear().weight, linear.weight)
    layer.unmerge()
    assert all(map(torch.equal, [t.view(torch.int8) for t in before if t.dim()], [
        t.view(torch.int8) for t in layer.quantized_weight().tensors if t.dim()
    ]))  # fmt: skip
    assert torch.equal(layer(x), y)


def test_reset_adapter_unmerges_and_makes_the_magnitude_the_norm():
    layer = trained()
    layer.merge(lossy=True)
    layer.reset_adapter()
    assert not layer.merged and layer.lora_B.count_nonzero() == 0
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), dense(layer).norm(dim=1))


# --- state ---


def test_state_dict_deepcopy_and_pickle_give_the_same_layer(settings):
    layer, x = trained(**settings).eval(), torch.randn(3, 72)
    y = layer(x)
    other = make(**settings).eval()
    other.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for same in (other, copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(same(x), y)
    incomplete = {key: t for key, t in layer.state_dict().items() if key != "lora_magnitude_vector"}
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_magnitude_vector"):
        other.load_state_dict(incomplete)


def test_a_new_magnitude_follows_a_loaded_weight_and_a_trained_one_stays(settings):
    base, x = nn.Linear(72, 40), torch.randn(3, 72)
    layer = make(**settings)
    layer.load_state_dict(base.state_dict())  # dense, so it is quantised
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), dense(layer).norm(dim=1))
    torch.testing.assert_close(layer(x), F.linear(x, dense(layer), base.bias), rtol=1e-4, atol=1e-5)
    layer = trained(**settings)
    m = layer.lora_magnitude_vector.detach().clone()
    layer.load_state_dict(base.state_dict())
    assert torch.equal(layer.lora_magnitude_vector, m)
    torch.testing.assert_close(layer(x).double(), truth(layer, x), rtol=1e-4, atol=1e-4)


def test_a_layer_from_the_meta_device_can_be_filled():
    state, x = trained().state_dict(), torch.randn(2, 72)
    layer = make(nn.Linear(72, 40, device="meta"))
    assert layer(torch.empty(2, 3, 72, device="meta")).shape == (2, 3, 40)
    layer.load_state_dict(state, assign=True)
    torch.testing.assert_close(layer(x).double(), truth(layer, x), rtol=1e-4, atol=1e-4)
    layer = make(nn.Linear(72, 40, device="meta")).to_empty(device="cpu")
    assert layer.lora_magnitude_vector.isnan().all()
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), F.linear(x, dense(layer), layer.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_change_neither_codes_nor_the_meaning(dtype):
    layer, x = trained(), torch.randn(3, 72)
    want = truth(layer, x)
    layer.to(dtype)
    assert layer.lora_magnitude_vector.dtype == dtype and layer.weight.dtype == torch.int8
    torch.testing.assert_close(layer(x.to(dtype)).double(), want, rtol=0.1, atol=0.2)


# --- compile, checkpointing, files, models ---


def test_a_compiled_layer_is_one_graph():
    layer, x = trained(double_quant=True, lora_dropout=0.5), torch.randn(6, 72)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want = layer_results(layer, x)
    assert len(want) == 5
    torch.testing.assert_close(layer_results(layer, x, compiled), want)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_mask(use_reentrant):
    layer, x = trained(lora_dropout=0.5), torch.randn(16, 72)
    plain = layer_results(layer, x)
    replayed = layer_results(layer, x, lambda t: checkpoint(layer, t, use_reentrant=use_reentrant))
    assert len(plain) == 5 and all(map(torch.equal, plain, replayed))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def test_a_model_is_adapted_saved_loaded_and_merged(tmp_path):
    torch.manual_seed(1)
    base = Block()
    models = [copy.deepcopy(base) for _ in range(2)]
    x = torch.randn(5, 24)
    for model in models:
        report = apply_lora(model, target_modules="all-linear", r=4, use_dora=True, quant="nf4")
        assert len(report.layers) == 2 and all(layer.use_dora for layer in report.layers)
    model, other = models
    for module in model.modules():
        if isinstance(module, QuantizedLoRALinear):
            nn.init.normal_(module.lora_B, std=0.3)
            with torch.no_grad():
                module.lora_magnitude_vector.mul_(0.5 + torch.rand(module.out_features))
    y = model(x)
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    assert torch.equal(other(x), y)
    merge_and_unload(other)
    assert type(other.up) is nn.Linear
    torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-4)
