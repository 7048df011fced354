"""Weights in integers: what the codes stand for, by an own way of unpacking; the kernels' products; what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_kernels.ops.linear import lora_linear
from lora_kernels.quant import integers
from lora_kernels.quant.integers import Integers
from lora_kernels.quant.weight import QuantizedWeight, dequantize_weight, quantize_like, shape_of

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def element(q: QuantizedWeight, n: int, k: int) -> float:
    """Return W[n, k] by the definition of its format, in Python's numbers; results are rounded by torch."""
    (N, K), dtype = q.shape, q.scales.dtype
    bits = 8 if q.format == "gptq8" else 4

    def packed(words: torch.Tensor, row: int, column: int) -> int:
        per_word = 32 // bits
        place = AWQ_ORDER.index(column % per_word) if q.format == "awq4" else column % per_word
        return (words[row, column // per_word].item() >> bits * place) & 2**bits - 1

    if q.format in integers.TURNED:
        if q.format == "awq4":
            code = packed(q.codes, k, n)
        else:
            per_word = 32 // bits
            code = (q.codes[k // per_word, n].item() >> bits * (k % per_word)) & 2**bits - 1
        group = q.integers.order[k].item() if q.integers.order.numel() else k // q.blocksize
        scale = q.scales[group, n]
        zeros = q.integers.zeros
        zero = 0 if not zeros.numel() else packed(zeros, group, n) if zeros.dtype == torch.int32 else zeros[group, n]
    else:
        code = q.codes[n % q.codes.shape[0], k].item()
        if q.format == "uint4-group":
            code = code >> 4 if n < N // 2 else code & 15
        at = (n * K + k) // q.blocksize
        scale, zero = q.scales[at], q.integers.zeros[at] if q.integers.zeros.numel() else 0
    shifted = (torch.tensor(float(code)) - torch.as_tensor(zero, dtype=FP32)).to(dtype)
    return (shifted.float() * scale.float()).to(dtype).item()


def make(format, N, K, group, scales=FP32, zeros="none", order=False) -> QuantizedWeight:
    """Return a weight of random codes."""
    torch.manual_seed(0)
    shape, dtype = integers.codes_shape((N, K), format), integers.CODES[format]
    limits = torch.iinfo(dtype)
    codes = torch.randint(limits.min, limits.max + 1, shape).to(dtype)
    of_scales = integers.scales_shape((N, K), format, group)
    made = {
        "none": torch.empty(0),
        "floats": (torch.rand(of_scales) * 15).to(scales),
        "int8": torch.randint(-8, 8, of_scales).to(torch.int8),
        "packed": torch.randint(-(2**31), 2**31, (of_scales[0], N // (4 if format == "gptq8" else 8))).to(torch.int32),
    }[zeros]
    groups = torch.randint(0, of_scales[0], (K,) if order else (0,), dtype=torch.int32)
    scale = (torch.rand(of_scales) / 30 + 0.01).to(scales)
    return QuantizedWeight(format, (N, K), FP32, codes, scale, group, integers=Integers(made, groups)).check()


CASES = [
    ("int8-group", 6, 40, 8, FP32, "none", False),
    ("int8-group", 5, 33, 7, BF16, "int8", False),  # groups straddle rows
    ("uint8-group", 5, 33, 1000, FP16, "floats", False),
    ("uint4-group", 6, 40, 16, BF16, "floats", False),
    ("uint4-group", 4, 33, 11, FP32, "none", False),
    ("gptq4", 16, 48, 32, FP16, "packed", False),
    ("gptq4", 8, 40, 16, FP32, "floats", True),
    ("gptq8", 24, 36, 16, FP16, "packed", True),
    ("awq4", 16, 33, 16, FP16, "packed", False),
    ("awq4", 8, 20, 7, BF16, "int8", True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[5]}")
def test_elements_are_those_of_the_definition(case):
    q = make(*case)
    w = dequantize_weight(q)
    want = torch.tensor([[element(q, n, k) for k in range(q.shape[1])] for n in range(q.shape[0])])
    assert torch.equal(w, want) and shape_of(q.codes, q.format) == q.shape == tuple(w.shape)
    assert torch.equal(q.rows(1, q.shape[0] - 1, FP32), w[1:-1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[5]}")
def test_every_instruction_set_decodes_these_bits_and_multiplies_by_them(case):
    pytest.importorskip("lora_kernels._C")
    from lora_kernels import _C
    from lora_kernels.backends.cpu import quant

    format, _, _, group, *rest = case
    q = make(format, 264, 1096, group, *rest)  # several strips and passes
    w, before = q.rows(0, 264, FP32), _C.cpu_isa()
    try:
        for isa in _C.cpu_isas():
            _C.set_cpu_isa(isa)
            for n0, n1, k0, k1 in ((0, 264, 0, 1096), (3, 250, 2, 1090)):
                out = torch.full(((n1 - n0) * (k1 - k0),), float("nan"))
                assert torch.equal(quant.dequantize(q, n0, n1, k0, k1, out), w[n0:n1, k0:k1]), isa
            for M in (1, 5, 40):
                for dtype, bound in ((FP32, 1e-6), (BF16, 6e-3), (FP16, 8e-4)):
                    x, dy = torch.randn(M, 1096).to(dtype), torch.randn(M, 264).to(dtype)
                    for got, want in (
                        (quant.quantized_gemm(x, q), x.double() @ w.double().t()),
                        (quant.quantized_gemm(dy, q, True), dy.double() @ w.double()),
                    ):
                        assert (got.double() - want).norm() <= bound * want.norm(), (isa, M, dtype)
    finally:
        _C.set_cpu_isa(before)


def test_operators_take_them_through_torch_compile_and_flop_counters():
    from torch.utils.flop_counter import FlopCounterMode

    q = make("gptq4", 16, 48, 16, FP16, "packed", True)
    x, a, b = torch.randn(3, 48), torch.randn(4, 48), torch.randn(16, 4)
    want = lora_linear(x, q, a, b, scale=0.5)
    with FlopCounterMode(display=False) as counter:
        got = lora_linear(x, q, a, b, scale=0.5)
    assert torch.equal(got, want) and counter.get_total_flops() == 2 * 3 * (16 * 48 + 4 * (48 + 16))
    plain = x @ q.dequantize().t() + 0.5 * (x @ a.t()) @ b.t()
    torch.testing.assert_close(want, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"blocksize": 0}, "size of a group"),
        ({"scales": torch.ones(2, 16)}, r"\(3, 16\)"),
        ({"scales": torch.ones(3, 16, dtype=torch.float64)}, "must be fp32, bf16 or fp16"),
        ({"codes": torch.zeros(6, 16, dtype=torch.int64)}, "must be torch.int32"),
        ({"codes": torch.zeros(16, 6, dtype=torch.int32).t()}, "contiguous"),
        ({"integers": None}, "goes with"),
        ({"integers": Integers(torch.ones(3, 16, dtype=torch.int64), torch.empty(0))}, "floating or int8"),
        ({"integers": Integers(torch.ones(2, 16), torch.empty(0))}, r"\(3, 16\)"),
        ({"integers": Integers(torch.empty(0), torch.full((48,), 3, dtype=torch.int32))}, "groups from 0 to 2"),
        ({"shape": (16, 44)}, "whole words"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_their_values(change, why):
    with pytest.raises((TypeError, ValueError), match=why):
        replace(make("gptq4", 16, 48, 16), **change, checked=False).check()


def test_the_kernels_refuse_what_would_read_beyond_memory():
    quant = pytest.importorskip("lora_kernels.backends.cpu.quant")
    x = torch.randn(2, 48)
    for change in (
        {"scales": torch.ones(2, 16)},
        {"codes": torch.zeros(5, 16, dtype=torch.int32)},
        {"integers": Integers(torch.empty(0), torch.full((48,), 9, dtype=torch.int32))},
        {"integers": Integers(torch.ones(1, 16), torch.empty(0))},
        {"scales": torch.ones(1, 1).expand(3, 16)},
    ):
        with pytest.raises((TypeError, ValueError)):
            quant.quantized_gemm(x, replace(make("gptq4", 16, 48, 16), **change))


def test_nothing_is_quantised_into_them_here():
    with pytest.raises(ValueError, match="cannot be quantised again here"):
        quantize_like(torch.randn(16, 48), make("gptq4", 16, 48, 16))
