"""Quantised weights agree with the published tables and torch's own fp8 cast, survive round trips, and refuse bad
input."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.weight_bits import FOUR_BIT, TINY, bits, gaussian
from torch._subclasses import FakeTensorMode

from lora_kernels import quant
from lora_kernels.quant import encode, tables
from lora_kernels.quant.weight import (
    BLOCKSIZES,
    DTYPES,
    FORMATS,
    SCALINGS,
    Nested,
    QuantizedWeight,
    dequantize_weight,
    quantize_weight,
)

EVERY = [*((format, {}) for format in (*FOUR_BIT, "int8")), *(("fp8", {"scaling": scaling}) for scaling in SCALINGS)]


# --- the tables by their definitions ---


def test_nf4_is_the_quantiles_of_appendix_e():
    offset = 1 - (1 / 30 + 1 / 32) / 2
    upper, lower = ([offset + (0.5 - offset) * i / n for i in range(n)] for n in (8, 7))
    quantile = NormalDist().inv_cdf
    levels = sorted([*map(quantile, upper), 0.0, *(-quantile(p) for p in lower)])
    torch.testing.assert_close(
        tables.levels("nf4", torch.device("cpu")), torch.tensor(levels) / max(levels), rtol=2e-6, atol=0
    )


def test_fp4_is_a_float_of_two_exponent_bits_and_one_of_mantissa():
    def value(code: int) -> float:
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        # Exponent 0 holds the subnormal numbers 0 and 1/16. Exponents 1, 2 and 3 stand for the factors 8, 4 and 2.
        magnitude = mantissa / 16 if exponent == 0 else 2.0 ** (4 - exponent) * (1 + mantissa / 2)
        return (-1) ** sign * magnitude

    levels = tables.levels("fp4", torch.device("cpu"))
    torch.testing.assert_close(levels, torch.tensor([value(code) for code in range(16)]) / 12, rtol=0, atol=0)


def test_the_dynamic_map_has_decades_of_doubling_precision():
    table = tables.dynamic(torch.device("cpu"))
    assert table.shape == (256,) and (table.diff() > 0).all() and table[-1] == 1 and table[127] == 0
    assert torch.equal(table[:127].flip(0), -table[128:255])
    for i in range(7):
        decade = table[(table > 10.0 ** (i - 7)) & (table < 10.0 ** (i - 6))]
        step = 0.9 / 2**i * 10.0 ** (i - 6)
        assert len(decade) == 2**i
        torch.testing.assert_close(decade, 10.0 ** (i - 7) + step * (torch.arange(2**i) + 0.5), rtol=1e-6, atol=0)


def test_tables_are_made_once_and_outlive_the_mode_of_the_first_call(monkeypatch):
    made: dict = {}
    monkeypatch.setattr(tables, "_made", made)
    cpu = torch.device("cpu")
    with FakeTensorMode():
        tables.levels("nf4", cpu)
    assert not made
    with torch.inference_mode():
        table = tables.levels("nf4", cpu)
    assert not table.is_inference() and tables.levels("nf4", cpu) is table
    assert torch.compile(lambda: tables.levels("fp4", cpu) * 2, backend="eager")().shape == (16,)
    assert list(made) == [("nf4", cpu)]


@pytest.mark.parametrize("format", FOUR_BIT)
def test_a_number_gets_the_nearest_level(format):
    levels = tables.levels(format, torch.device("cpu"))
    v = torch.cat([torch.linspace(-1, 1, 20001), levels])
    distance = (v[:, None].double() - levels.double()).abs()
    chosen = distance.gather(1, tables.nearest4(format, v).long()[:, None])[:, 0]
    assert (chosen - distance.amin(1)).max() < 1e-7


# --- codes and values ---


def test_int8_holds_zeros_denormals_and_its_largest_number():
    w = torch.zeros(4, 6)
    w[1] = 1e-45
    w[2] = torch.tensor([1e-38, -1e-38, 4e-39, 0, -0.0, 1e-41])
    w[3, 0] = 2.6e36
    q = quantize_weight(w, "int8")
    assert q.codes.tolist() == [[0] * 6, [127] * 6, [127, -127, 51, 0, 0, 0], [127, 0, 0, 0, 0, 0]]
    assert q.dequantize()[3, 0] == torch.tensor(2.6e36) and not q.dequantize()[0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_fp8_rounds_as_the_cast_of_torch(scaling, dtype):
    w = gaussian(300, 260, dtype)
    w[:, :130] *= 100
    w[128:256, 128:256] = 0
    q = quantize_weight(w, "fp8", scaling=scaling).check()
    expected = torch.empty(300, 260)
    tiles = {"tensor": (300, 260), "row": (1, 260), "block": (128, 128)}[scaling]
    for n in range(0, 300, tiles[0]):
        for k in range(0, 260, tiles[1]):
            tile = w[n : n + tiles[0], k : k + tiles[1]].float()
            scale = tile.abs().max() / 448
            codes = (tile / scale).to(torch.float8_e4m3fn).float() if scale > 0 else tile
            expected[n : n + tiles[0], k : k + tiles[1]] = codes * scale
    assert q.dtype == dtype and torch.equal(q.dequantize(), expected.to(dtype))
    assert torch.equal(q.dequantize(torch.float32), expected)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_fp8_holds_zeros_denormals_and_large_numbers(scaling):
    for value in (0.0, 1e-45, 1e-40, 3e38):
        w = torch.full((3, 130), value)
        w_hat = quantize_weight(w, "fp8", scaling=scaling).dequantize()
        assert ((w_hat - w).abs() <= value / 16 + TINY / 1024).all()


def test_the_high_nibble_is_the_even_element():
    levels = tables.levels("nf4", torch.device("cpu"))
    q = quantize_weight(levels.repeat(2, 4))
    assert q.codes[1, :8].tolist() == [16 * (2 * j) + 2 * j + 1 for j in range(8)]
    assert q.scales.tolist() == [1, 1] and torch.equal(q.dequantize(), levels.repeat(2, 4))


@pytest.mark.parametrize(("format", "setting"), EVERY)
def test_the_size_of_the_slices_changes_no_bit(format, setting, monkeypatch):
    w = gaussian(300, 258)
    settings = [setting] if format not in FOUR_BIT else [{"blocksize": 128}, {"blocksize": 4096, "double_quant": True}]
    whole = [quantize_weight(w, format, **each) for each in settings]
    expected = [q.dequantize() for q in whole]
    monkeypatch.setattr(encode, "SLICE", 4096)
    for each, q, w_hat in zip(settings, whole, expected, strict=True):
        sliced = quantize_weight(w, format, **each)
        assert all(torch.equal(bits(s), bits(t)) for s, t in zip(sliced.tensors, q.tensors, strict=True))
        assert torch.equal(sliced.dequantize(), w_hat)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("format", "setting"), EVERY)
def test_rows_are_rows_of_the_whole(format, setting, dtype, poison):
    w = gaussian(300, 258, dtype)
    settings = [setting] if format not in FOUR_BIT else [{}, {"blocksize": 1024, "double_quant": True}]
    for each in settings:
        q = quantize_weight(w, format, **each)
        whole = dequantize_weight(q)
        assert whole.shape == w.shape and whole.dtype == w.dtype and whole.is_contiguous()
        for n0, n1 in ((0, 1), (0, 300), (1, 2), (37, 41), (127, 257), (299, 300), (5, 5), (300, 300)):
            assert torch.equal(q.rows(n0, n1), whole[n0:n1])
            assert q.rows(n0, n1, torch.float16).dtype == torch.float16
        for n0, n1 in ((-1, 3), (5, 4), (0, 301)):
            with pytest.raises(ValueError, match=f"rows {n0} to {n1} of a weight of 300 rows"):
                q.rows(n0, n1)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
@pytest.mark.parametrize(("format", "setting"), EVERY)
def test_empty_weights_come_back_empty(format, setting, shape):
    for each in [setting] + [{"double_quant": True}] * (format in FOUR_BIT):
        q = quantize_weight(torch.empty(shape, dtype=torch.bfloat16), format, **each).check()
        assert q.dequantize().shape == shape and q.dequantize().dtype == torch.bfloat16
        assert q.rows(0, shape[0]).shape == shape


@pytest.mark.parametrize(("format", "setting"), EVERY)
def test_quantising_leaves_the_given_weight_as_it_is(format, setting):
    w = gaussian(5, 66).requires_grad_()
    before = w.detach().clone()
    q = quantize_weight(w, format, **setting)
    assert torch.equal(w, before) and not any(tensor.requires_grad for tensor in q.tensors)
    assert not q.dequantize().requires_grad


def test_bytes_device_and_moves():
    q = quantize_weight(gaussian(128, 64), double_quant=True)
    assert q.nbytes == 128 * 32 + 128 + 4 * (256 + 1 + 1) and q.device == torch.device("cpu")
    moved = q.to("meta")
    assert {tensor.device.type for tensor in moved.tensors} == {"meta"} and moved.check().shape == q.shape
    assert torch.equal(q.to("cpu").dequantize(), q.dequantize())
    assert quantize_weight(gaussian(3, 5), "int8").to("meta").nested is None


# --- round trips ---


@st.composite
def weights(draw):
    N, K = draw(st.integers(1, 9)), 2 * draw(st.integers(1, 80))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(N, K, generator=generator) * 10.0 ** draw(st.integers(-20, 20))
    w[torch.rand(N, K, generator=generator) < draw(st.sampled_from([0, 0.3, 0.99]))] = 0
    w[:, draw(st.integers(0, K - 1))] *= draw(st.sampled_from([1, 0, 1e3]))
    return w


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from(FOUR_BIT), st.sampled_from(BLOCKSIZES))
def test_four_bits_go_to_the_nearest_level_and_stay_there(w, format, blocksize):
    q = quantize_weight(w, format, blocksize=blocksize)
    w_hat = q.dequantize()
    absmax = q.scales.repeat_interleave(blocksize)[: w.numel()].view_as(w).double()
    levels = tables.levels(format, w.device).double()
    nearest = (w.double()[..., None] - levels * absmax[..., None]).abs().amin(-1)
    assert ((w - w_hat).double().abs() <= nearest + absmax * 2**-22).all()
    again = quantize_weight(w_hat, format, blocksize=blocksize)
    assert torch.equal(again.dequantize(), w_hat)
    if format == "nf4":  # fp4 has two zeros, and one of them comes back as the other
        assert torch.equal(again.codes, q.codes)


@settings(max_examples=60, deadline=None)
@given(weights())
def test_int8_is_within_half_a_step_and_stays_there(w):
    q = quantize_weight(w, "int8")
    w_hat = q.dequantize()
    assert ((w - w_hat).abs() <= q.scales[:, None] / 127 * (0.5 + 2**-14)).all()
    assert torch.equal(quantize_weight(w_hat, "int8").codes, q.codes)


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from(SCALINGS))
def test_fp8_is_within_half_a_step_and_stays_there(w, scaling):
    q = quantize_weight(w, "fp8", scaling=scaling)
    w_hat = q.dequantize()
    smallest = encode.fp8_spread(q.scales, q.shape, 0, q.shape[0]) * 2**-10
    assert ((w - w_hat).abs() <= torch.maximum(w.abs() * 2**-4, smallest) * (1 + 2**-20)).all()
    assert torch.equal(bits(quantize_weight(w_hat, "fp8", scaling=scaling).codes), bits(q.codes))


# --- bad input ---


@pytest.mark.parametrize(
    ("w", "settings", "error", "message"),
    [
        (torch.ones(2, 4), {"format": "int4"}, ValueError, "unknown format 'int4'.*'nf4', 'fp4', 'int8', 'fp8'"),
        (torch.ones(2, 4), {"blocksize": 48}, ValueError, "32, 64, .*4096, got 48"),
        (torch.ones(2, 4), {"format": "fp8", "scaling": "column"}, ValueError, "unknown scaling 'column'.*'block'"),
        (torch.ones(2, 4), {"format": "int8", "double_quant": True}, ValueError, "got format 'int8'"),
        (torch.ones(2, 4).double(), {}, TypeError, "got torch.float64"),
        (torch.ones(2, 4).byte(), {}, TypeError, "got torch.uint8: from_bnb"),
        (torch.ones(4), {}, ValueError, r"\[N, K\].*got \(4,\)"),
        (torch.ones(2, 5), {"format": "fp4"}, ValueError, r"K is odd in \(2, 5\): pad W"),
        (torch.full((2, 64), 3e38), {"double_quant": True}, ValueError, r"reaches 3e\+38.* 2 absmax overflows"),
        (torch.full((2, 4), 3e36), {"format": "int8"}, ValueError, r"reaches 3e\+36.*2\.679e\+36.*nf4"),
    ],
)
def test_a_weight_or_setting_that_cannot_be_is_refused(w, settings, error, message):
    with pytest.raises(error, match=message):
        quantize_weight(w, **settings)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("format", "setting"), EVERY)
def test_nonfinite_weights_are_counted_and_placed(format, setting, value):
    w = gaussian(70, 130)
    w[3, 7] = w[3, 9] = w[69, 129] = value
    with pytest.raises(ValueError, match=rf"3 of the 9100 elements .* {value} at \(3, 7\)"):
        quantize_weight(w, format, **setting)


def parts(format="nf4", **changes):
    """Return a weight of 6 x 64, with some of its parts changed."""
    good = {
        "nf4": {"codes": torch.zeros(6, 32, dtype=torch.uint8), "scales": torch.ones(6), "blocksize": 64},
        "int8": {"codes": torch.zeros(6, 64, dtype=torch.int8), "scales": torch.ones(6)},
        "fp8": {"codes": torch.zeros(6, 64).to(torch.float8_e4m3fn), "scales": torch.ones(6, 1)},
    }[format]
    return QuantizedWeight(**{"format": format, "shape": (6, 64), "dtype": torch.float32, **good, **changes})


def nested(**changes):
    good = {"table": torch.zeros(256), "absmax": torch.zeros(1), "offset": torch.zeros(())}
    return {"scales": torch.zeros(6, dtype=torch.uint8), "nested": Nested(**(good | changes))}


@pytest.mark.parametrize("given", [parts(format) for format in ("nf4", "int8", "fp8")] + [parts(**nested())])
def test_check_returns_a_weight_whose_parts_fit(given):
    assert given.check() is given


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda: QuantizedWeight("q4", (6, 64), torch.float32, *parts().tensors), ValueError, "'q4'.*'nf4', 'fp4'"),
        (lambda: parts(dtype=torch.int8), TypeError, "bf16 or fp16, got torch.int8"),
        (lambda: parts(shape=(6, 8, 8)), ValueError, r"\(N, K\), got \(6, 8, 8\)"),
        (lambda: parts(shape=(6, 63)), ValueError, r"odd in \(6, 63\): pad"),
        (lambda: parts(blocksize=48), ValueError, "one of 32, .*got 48"),
        (lambda: parts("int8", blocksize=64), ValueError, "blocksize of int8 is 0.*got 64"),
        (lambda: parts("fp8", **nested()), ValueError, "go with nf4 and fp4; got them with fp8"),
        (lambda: parts(codes=torch.zeros(6, 32)), TypeError, r"codes of nf4 of \(6, 64\).*uint8, got torch.float32"),
        (lambda: parts(codes=torch.zeros(192, 1).byte()), ValueError, r"codes.*\(6, 32\), got \(192, 1\)"),
        (lambda: parts(codes=torch.zeros(32, 6).byte().t()), ValueError, r"contiguous, got strides \(1, 6\)"),
        (lambda: parts(scales=torch.ones(5)), ValueError, r"in blocks of 64 must be \(6,\), got \(5,\)"),
        (lambda: parts(scales=torch.ones(6).half()), TypeError, "scales.*float32, got torch.float16"),
        (lambda: parts(scales=torch.ones(6).byte()), TypeError, "scales.*float32, got torch.uint8"),
        (lambda: parts("int8", codes=torch.zeros(6, 64).byte()), TypeError, "codes of int8.*got torch.uint8"),
        (lambda: parts("int8", scales=torch.ones(6, 1)), ValueError, r"must be \(6,\), got \(6, 1\)"),
        (lambda: parts("fp8", scales=torch.ones(6)), ValueError, r"\(1, 1\) or \(6, 1\), got \(6,\)"),
        (lambda: parts(**nested(table=torch.zeros(16))), ValueError, r"nested.table.*\(256,\), got \(16,\)"),
        (lambda: parts(**nested(absmax=torch.zeros(2))), ValueError, r"nested.absmax.*\(1,\), got \(2,\)"),
        (lambda: parts(**nested(offset=torch.zeros(1))), ValueError, r"nested.offset.*\(\), got \(1,\)"),
        (lambda: parts(**nested(offset=torch.zeros(()).half())), TypeError, "nested.offset.*got torch.float16"),
        (lambda: parts(**nested() | {"scales": torch.ones(6)}), TypeError, "scales.*uint8, got torch.float32"),
        (lambda: parts(scales=torch.ones(6, device="meta")), ValueError, "different devices: cpu, meta"),
    ],
)
def test_bad_parts_are_named(given, error, message):
    with pytest.raises(error, match=message):
        given().check()


def test_every_format_is_tested():
    assert {format for format, _ in EVERY} == set(FORMATS)


def test_the_parts_of_a_nested_weight_are_a_public_type():
    q = quantize_weight(torch.randn(8, 64), "nf4", double_quant=True)
    assert quant.Nested is Nested and isinstance(q.nested, Nested)
