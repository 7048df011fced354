"""The sums of the norms of DoRA over an embedding, by the native kernel, against the formula in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from support.fences import fences
from torch import Tensor

_C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels were not built on this machine")

EPS = torch.finfo(torch.float32).eps
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
SHAPES = [  # V, D, R
    (0, 3, 2),
    (3, 0, 2),
    (5, 3, 0),
    (1, 1, 1),
    (1, 70, 4),
    (2, 1, 9),
    (23, 191, 1),
    (25, 193, 7),
    (49, 130, 64),
    (385, 65, 8),  # one row after the sums in fp32, and the second slab
    (30, 500, 300),  # several chunks of columns of w and of a^T
    (800, 1000, 100),  # slabs of rows by chunks of columns
    (6500, 17, 16),  # the most slabs
]


def operands(V: int, D: int, R: int, dtype: torch.dtype, a_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(V + D + R)
    w, a_t = (torch.randn(V, n, generator=generator) for n in (D, R))
    return w.to(dtype), a_t.to(a_dtype)


def outputs(D: int, R: int) -> list[Tensor]:
    return [torch.full(size, math.nan) for size in ((D,), (R, D), (R, R))]


def sums(w: Tensor, a_t: Tensor, threads: int = 1) -> list[Tensor]:
    out = outputs(w.shape[1], a_t.shape[1])
    _C.column_sums(threads, w, a_t, *out)
    return out


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize(("dtype", "a_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sums_are_exact_to_a_few_eps_of_the_sums_of_their_magnitudes(isa, shape, dtype, a_dtype):
    w, a_t = operands(*shape, dtype, a_dtype)
    square, low, gram = sums(w, a_t)
    w, a = w.double(), a_t.double().t()
    for got, x, y in ((square, w.square(), None), (low, a, w), (gram, a, a.t())):
        want, most = (x.sum(0), x.sum(0)) if y is None else (x @ y, x.abs() @ y.abs())
        assert ((got - want).abs() <= 8 * EPS * most).all()


def test_a_long_column_of_squares_is_exact_to_an_eps(isa):
    """Each square is 1 + 2⁻¹¹ + 2⁻²⁴. One fp32 sum over all rows would be wrong by thousands of eps."""
    w = torch.full((60_000, 3), 1 + 2.0**-12)
    square, _, _ = sums(w, torch.zeros(60_000, 1))
    want = w.double().square().sum(0)
    assert ((square - want).abs() <= 2 * EPS * want).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3001, 300, 8), (800, 1000, 100), (900, 70, 70)])
def test_the_bits_do_not_depend_on_threads_or_strides(isa, shape, dtype):
    w, a_t = operands(*shape, dtype, torch.float32)
    want = sums(w, a_t)
    for threads in (1, 2, 3):
        assert same(sums(w, a_t, threads), want)
    wide = torch.full((shape[0], shape[1] + 5), math.nan, dtype=dtype)
    wide[:, 2:-3] = w
    for layout in (a_t.t().contiguous().t(), a_t.repeat_interleave(2, 1)[:, ::2]):
        assert same(sums(wide[:, 2:-3], layout), want)
    assert same(sums(w.t().contiguous().t(), a_t), want)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("dtype", "a_dtype"), DTYPES)
def test_reads_and_writes_stay_inside_the_operands(isa, dtype, a_dtype, turned):
    for shape in ((1, 1, 1), (25, 193, 7), (49, 131, 65)):
        w, a_t = operands(*shape, dtype, a_dtype)
        want = sums(w, a_t)
        with fences() as fenced:
            out = [fenced(t) for t in outputs(*shape[1:])]
            _C.column_sums(1, fenced(w), fenced(a_t.t()).t() if turned else fenced(a_t), *out)
            assert same(out, want)


def test_what_is_not_finite_stays_in_its_column(isa):
    w, a_t = operands(100, 40, 3, torch.float32, torch.float32)
    w[50, 7], w[51, 39] = math.nan, math.inf
    square, low, _ = sums(w, a_t)
    for t in (square, low):
        assert (~t.isfinite()).any(0).sum() == (1 if t.dim() == 1 else 2)
    assert square[7].isnan() and square[39].isinf() and square.isfinite().sum() == 38


def test_operands_that_do_not_fit_are_refused():
    sizes = {"w": (6, 5), "lora_a_t": (6, 2), "square": (5,), "low": (2, 5), "gram": (2, 2)}

    def run(**changes):
        t = {name: torch.zeros(size) for name, size in sizes.items()} | changes
        _C.column_sums(1, *t.values())

    run()
    for name, size in sizes.items():
        for i in range(len(size)):
            for change in (-1, 1):
                wrong = [n + change * (i == j) for j, n in enumerate(size)]
                with pytest.raises(ValueError, match=r"the CPU kernels take \w+ of size \[\d+, \d+\] here, got \["):
                    run(**{name: torch.zeros(wrong)})
    for name in ("square", "low", "gram"):
        with pytest.raises(TypeError, match="sums in float32"):
            run(**{name: torch.zeros(sizes[name]).half()})
    for name in ("w", "lora_a_t"):
        with pytest.raises(TypeError, match="got None"):
            run(**{name: None})
        with pytest.raises(ValueError, match="meta device"):
            run(**{name: torch.zeros(sizes[name], device="meta")})
