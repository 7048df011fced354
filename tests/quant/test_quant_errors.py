"""Each error of quantised layers names the fault, its values and the way out, and changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear, lora_linear
from lora_kernels.models.inject import apply_lora
from lora_kernels.nn.quantized import QuantizedLoRALinear
from lora_kernels.quant.weight import FORMATS, Nested, quantize_weight


def refused(error: type[Exception], match: str, linear: nn.Linear, **settings) -> None:
    """Assert that `from_linear`, and `apply_lora` with the layer's name, raise and leave everything as it was."""
    weight, trained = linear.weight, linear.weight.requires_grad
    with pytest.raises(error, match=match):
        FusedLoRALinear.from_linear(linear, **settings)
    model = nn.Sequential(nn.Linear(4, linear.in_features), nn.Sequential(linear))
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(error, match=rf"^1\.0: .*{match}"):
        apply_lora(model, target_modules=["1.0"], **settings)
    assert [type(m) for m in model.modules()] == kinds and all(p.requires_grad for p in model[0].parameters())
    assert linear.weight is weight and linear.weight.requires_grad == trained


@pytest.mark.parametrize("quant", ["nf3", "NF4", ""])
def test_an_unknown_format_lists_the_known_ones(quant):
    known = ", ".join(map(repr, FORMATS))
    refused(ValueError, f"unknown format '{quant}': it is one of {known}", nn.Linear(8, 4), quant=quant)


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_an_odd_k_is_refused_in_4_bits_only(quant):
    refused(ValueError, r"K is odd in \(4, 7\).*column of zeros.*int8 or fp8", nn.Linear(7, 4), quant=quant)
    for other in ("int8", "fp8"):
        assert FusedLoRALinear.from_linear(nn.Linear(7, 4), quant=other)(torch.randn(2, 7)).shape == (2, 4)


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_counted_and_placed(quant, value):
    linear = nn.Linear(8, 6)
    with torch.no_grad():
        linear.weight[2, 3] = linear.weight[5, 1] = value
    refused(
        ValueError,
        r"2 of the 48 elements of the weight are NaN or infinite, the first of them .* at \(2, 3\)",
        linear,
        quant=quant,
    )


def test_settings_that_do_not_go_together_are_refused():
    refused(
        ValueError,
        "double_quant is for nf4 and fp4, got format 'int8'",
        nn.Linear(8, 4),
        quant="int8",
        double_quant=True,
    )
    refused(ValueError, 'double_quant is for quant="nf4".*quant is None', nn.Linear(8, 4), double_quant=True)
    refused(ValueError, "blocksize must be one of 32, 64.*got 48", nn.Linear(8, 4), quant="nf4", blocksize=48)
    refused(TypeError, "adapter_dtype must be the weight's", nn.Linear(8, 4), quant="nf4", adapter_dtype=torch.float16)
    refused(ValueError, "r must be an integer of at least 1, got 0", nn.Linear(8, 4), quant="nf4", r=0)


def test_a_dtype_that_cannot_be_quantised_is_refused():
    refused(TypeError, "must be fp32, bf16 or fp16.*torch.float64", nn.Linear(8, 4).double(), quant="nf4")


def test_a_weight_that_is_quantised_already_is_refused_with_the_way_out():
    linear = nn.Linear(8, 4)
    linear.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"torch.uint8, quantised already.*from_bnb"):
        FusedLoRALinear.from_linear(linear)
    with pytest.raises(TypeError, match=r"torch.uint8.*from_bnb"):
        FusedLoRALinear.from_linear(linear, quant="nf4")
    with pytest.raises(TypeError, match=r"from_bnb takes a Linear4bit or Linear8bitLt"):
        QuantizedLoRALinear.from_bnb(nn.Linear(8, 4))


def test_a_layer_of_bitsandbytes_in_a_plain_model_is_named_with_the_way_out():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = nn.Sequential(nn.Linear(8, 64), bnb.nn.Linear4bit(64, 32).to("cpu"))
    with pytest.raises(ValueError, match=r"a Linear4bit of bitsandbytes.*get_peft_model.*QuantizedLoRALinear.from_bnb"):
        apply_lora(model, target_modules=["1"])
    assert "Linear4bit of bitsandbytes" in apply_lora(model).passed_over["1"]


PARTS = [
    ("nf4", lambda q: replace(q, scales=q.scales[1:]), ValueError, r"scales of nf4 of \(6, 64\).*\(6,\), got \(5,\)"),
    ("nf4", lambda q: replace(q, scales=q.scales.half()), TypeError, "scales of nf4.*must be torch.float32"),
    ("nf4", lambda q: replace(q, codes=q.codes[:, 1:]), ValueError, r"codes of nf4.*must be \(6, 32\), got \(6, 31\)"),
    ("nf4", lambda q: replace(q, codes=q.codes.short()), TypeError, "codes of nf4.*must be torch.uint8"),
    ("nf4", lambda q: replace(q, codes=q.codes.t().contiguous().t()), ValueError, "contiguous"),
    ("nf4", lambda q: replace(q, format="nf5"), ValueError, "unknown format 'nf5'"),
    ("nf4", lambda q: replace(q, blocksize=0), ValueError, "the blocksize of nf4 is one of"),
    ("nf4", lambda q: replace(q, dtype=torch.int8), TypeError, "fp32, bf16 or fp16, got torch.int8"),
    ("nf4", lambda q: replace(q, scales=q.scales.to("meta")), ValueError, "different devices: cpu, meta"),
    ("nf4", lambda q: replace(q, nested=Nested(*torch.zeros(2, 256), torch.zeros(()))), TypeError, "torch.uint8"),
    ("int8", lambda q: replace(q, scales=q.scales[1:]), ValueError, r"scales of int8.*must be \(6,\), got \(5,\)"),
    ("fp8", lambda q: replace(q, scales=q.scales[1:]), ValueError, r"must be \(1, 1\) or \(6, 1\), got \(5, 1\)"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "spoil", "error", "match"), PARTS)
def test_parts_that_do_not_fit_together_are_named(format, spoil, error, match):
    q = quantize_weight(torch.randn(6, 64), format)
    with pytest.raises(error, match=match):
        QuantizedLoRALinear.over(spoil(q))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("part", ["codes", "scales"])
def test_a_part_that_was_replaced_after_the_check_is_named(format, part):
    q = quantize_weight(torch.randn(6, 64), format).check()
    q.refuse_changed()
    for other in (getattr(q, part)[:2], getattr(q, part)[:1].expand_as(getattr(q, part))):
        with pytest.raises(ValueError, match=f"{part} of {format}.*must be"):
            replace(q, **{part: other}).refuse_changed()


def test_a_bias_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"the bias \(5,\) does not fit a weight of \(6, 64\)"):
        QuantizedLoRALinear.over(quantize_weight(torch.randn(6, 64)), nn.Parameter(torch.zeros(5)))


@pytest.mark.parametrize("format", FORMATS)
def test_operands_that_do_not_fit_are_named(format):
    q = quantize_weight(torch.randn(6, 64), format)
    a, b = torch.randn(2, 64), torch.randn(6, 2)
    layer = QuantizedLoRALinear.over(q, r=2)
    for call in (layer, lambda x: lora_linear(x, q, a, b, scale=1.0)):
        with pytest.raises(ValueError, match=r"differ in K.*x \(3, 62\), weight \(6, 64\)"):
            call(torch.randn(3, 62))
        with pytest.raises(ValueError, match="x on meta, weight on cpu"):
            call(torch.randn(3, 64, device="meta"))
        with pytest.raises(TypeError, match="x must be fp64, fp32, fp16 or bf16"):
            call(torch.randint(9, (3, 64)))
    with pytest.raises(ValueError, match="x on cpu, weight on meta, lora_a on cpu"):
        lora_linear(torch.randn(3, 64), q.to("meta"), a, b, scale=1.0)
    with pytest.raises(TypeError, match="lora_a and lora_b must both have x's dtype"):
        lora_linear(torch.randn(3, 64), q, a.half(), b.half(), scale=1.0)
    with pytest.raises(ValueError, match=r"differ in N.*weight \(6, 64\).*lora_b \(5, 2\)"):
        lora_linear(torch.randn(3, 64), q, a, b[1:], scale=1.0)
