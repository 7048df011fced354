"""The native GEMM, with every instruction set that this machine can run, against the product in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels were not built on this machine")
from support.native_problems import X_DTYPES, close, gemm, gemm_operands, gemm_serves  # noqa: E402

from lora_kernels.core.operands import Adapter, Base  # noqa: E402

GEMM_SHAPES = [(1, 1, 1), (3, 100, 2100), (16, 97, 1030), (17, 33, 129), (40, 800, 300), (250, 70, 513), (29, 31, 0)]
GEMM_DTYPES = [dtype for dtype in X_DTYPES if _C.has_gemm(dtype)]


@pytest.mark.parametrize("w_is", ["along k", "along n", "strided"])
@pytest.mark.parametrize("dtype", X_DTYPES)
def test_gemm_is_within_the_bound_of_an_fp32_sum(isa: str, dtype: torch.dtype, w_is: str) -> None:
    """y = x wᵀ. There is a GEMM for every M and every layout of w in fp32, and in bf16 with AVX512_BF16. In the other
    16-bit cases there is one for few rows of x."""
    served = 0
    for M, N, K in [*GEMM_SHAPES, (2100, 40, 1100)]:
        x, w, y = gemm_operands(M, N, K, dtype, w_is)
        if not gemm_serves(x, w):
            continue
        served += 1
        exact, size = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
        close(gemm(x, w, y), (exact, size, K))
    every = dtype == torch.float32 or (dtype == torch.bfloat16 and isa == "avx512_bf16")
    few = {"along k": 3, "along n": 1, "strided": 0}[w_is]  # a w of one element counts as both "along k" and "along n"
    assert served == (len(GEMM_SHAPES) + 1 if every else few)


def test_gemm_refuses_a_dtype_that_it_does_not_have() -> None:
    x, w, y = gemm_operands(17, 8, 8, torch.float16, "along k")
    with pytest.raises(ValueError, match=r"no GEMM of many rows.*: has_gemm tells which dtypes have one"):
        gemm(x, w, y)


@pytest.mark.parametrize("M", [1, 3, 5, 16])
@pytest.mark.parametrize("dtype", X_DTYPES)
def test_a_launch_with_the_base_product_of_few_rows_gives_the_same_bits(isa: str, dtype: torch.dtype, M: int) -> None:
    """The bits are those of the GEMM followed by the low-rank half. The launch serves two layers, and computes the base
    product of the first one only."""
    K, R, N = 1030, 20, (300, 97)
    x = torch.randn(M, K).to(dtype)
    ws, as_, bs = ([torch.randn(*shape).to(dtype) for shape in shapes] for shapes in (
        [(n, K) for n in N], [(R, K) for _ in N], [(n, R) for n in N]))  # fmt: skip
    want = [gemm(x, w, torch.full((M, w.shape[0]), math.nan, dtype=dtype)) for w in ws]

    bases = [Base(w) for w in ws]
    adapters = [Adapter(a, b, 0.5) for a, b in zip(as_, bs, strict=True)]

    def run(threads: int, ys: list[Tensor], products: list[bool]) -> None:
        _C.forward(threads, x, bases, adapters, ys, [None, None], products)

    ys = [torch.full_like(want[0], math.nan), want[1].clone()]
    run(1, want, [False, False])
    for threads in (1, 2, 7):
        got = [ys[0].clone(), ys[1].clone()]
        run(threads, got, [True, False])
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (3, 70, 300), (8, 128, 128), (16, 129, 97)])
@pytest.mark.parametrize("dtype", X_DTYPES)
def test_a_launch_with_small_base_products_of_a_backward_gives_dx(
    isa: str, dtype: torch.dtype, M: int, K: int, N: int
) -> None:
    """dx = Σ (dy w + g a) over two layers. The launch computes one of the base products, or both; then it does not read
    dx. The bits depend neither on the number of threads nor on the strides of the rows."""
    R = 5
    dys = [torch.randn(M, N + 3).to(dtype)[:, :N] for _ in "12"]
    ws = [torch.randn(N, K + 1).to(dtype)[:, :K] for _ in "12"]
    adapters = [Adapter(torch.randn(R, K), torch.randn(N, R), 0.5) for _ in "12"]
    bases = [Base(w) for w in ws]
    terms = [(dy.double(), w.double()) for dy, w in zip(dys, ws, strict=True)]
    terms += [(0.5 * dy.double() @ b.double(), a.double()) for dy, (a, b, *_) in zip(dys, adapters, strict=True)]
    exact = sum(left @ right for left, right in terms)
    size = sum(left.abs() @ right.abs() for left, right in terms)

    def run(threads: int, dx: Tensor, products: list[bool], dys: list[Tensor]) -> Tensor:
        nothing: list[None] = [None, None]
        _C.backward(threads, dys, None, bases, adapters, nothing, dx, nothing, nothing, products)
        return dx

    def unread() -> Tensor:
        return torch.full((M, K), math.nan, dtype=dtype)

    both = run(1, unread(), [True, True], dys)
    one = run(1, (terms[0][0] @ terms[0][1]).to(dtype), [False, True], dys)
    for dx in (both, one):
        # dx is rounded to its dtype after each of the four products, and no sum so far is larger than `size`.
        bound = ((2 * (N + R) + 4) * 2**-24 + 4 * torch.finfo(dtype).eps / 2) * size
        assert ((dx.double() - exact).abs() <= bound).all()
    for threads in (2, 7):
        assert torch.equal(run(threads, unread(), [True, True], dys), both)
    assert torch.equal(run(1, unread(), [True, True], [dy.contiguous() for dy in dys]), both)


@pytest.mark.parametrize("dtype", X_DTYPES)
def test_a_product_of_few_rows_is_rounded_once_with_its_bias(isa: str, dtype: torch.dtype) -> None:
    for M, N, K in ((1, 1, 1), (3, 77, 130), (16, 300, 513)):
        x, w, bias = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
        x[0], w[0], bias[0] = 0, 0, 3
        exact = x.double() @ w.double().t() + bias.double()
        size = x.double().abs() @ w.double().abs().t() + bias.double().abs()
        for threads in (1, 3):
            y = torch.full((M, N), math.nan, dtype=dtype)
            _C.gemm(threads, x, w, y, False, bias)
            bound = (K + 2) * 2**-24 * size + torch.finfo(dtype).eps / 2 * (exact.abs() + (K + 2) * 2**-24 * size)
            assert ((y.double() - exact).abs() <= bound).all()


def test_small_base_products_are_computed_in_the_launch(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small layer needs no call of a GEMM, forward or backward. Without vector instructions, and for larger layers,
    there is one."""
    from lora_kernels.backends import cpu
    from lora_kernels.core.operands import Needs

    calls: list[str] = []
    monkeypatch.setattr(cpu.gemm, "chosen", lambda *_: calls.append("chosen") or "torch")
    monkeypatch.setattr(cpu.launch, "has_bases", lambda *_: False)
    needs = Needs(True, (False,), (False,))
    for M, n in ((8, 64), (16, 128), (17, 16), (16, 129)):
        base, adapter = Base(torch.randn(n, n)), Adapter(torch.randn(4, n), torch.randn(n, 4), 1.0)
        calls.clear()
        x, dy = torch.randn(M, n), torch.randn(M, n)
        (y,), _ = cpu.forward(x, [base], [adapter], [False])
        dx, *_ = cpu.backward([dy], None, [base], [adapter], [None], needs)
        assert calls == ([] if _C.is_small(M, n, n) else ["chosen", "chosen"])
        x, dy, w, a, b = (t.double() for t in (x, dy, base.w, adapter.a, adapter.b))
        close(y, (x @ w.t() + x @ a.t() @ b.t(), x.abs() @ w.abs().t() + x.abs() @ a.abs().t() @ b.abs().t(), n + 8))
        close(dx, (dy @ w + dy @ b @ a, dy.abs() @ w.abs() + dy.abs() @ b.abs() @ a.abs(), n + 8))
    vectors = isa != "baseline"
    for size in ((8, 64, 64), (16, 128, 128), (1, 256, 256), (16, 256, 16), (1, 1, 1), (1, 1, 65536)):
        assert _C.is_small(*size) == vectors
    for size in ((17, 16, 16), (16, 129, 128), (1, 257, 256), (16, 257, 16), (1, 17, 1), (0, 8, 8), (1, 8, 0)):
        assert not _C.is_small(*size)


@pytest.mark.parametrize("w_is", ["along k", "along n"])
@pytest.mark.parametrize("dtype", GEMM_DTYPES)
def test_gemm_adds_with_one_rounding(dtype: torch.dtype, w_is: str) -> None:
    for M, N, K in [(17, 33, 129), (40, 800, 300), (70, 70, 2113), (29, 31, 0)]:
        x, w, y = gemm_operands(M, N, K, dtype, w_is)
        y = torch.randn(M, N).to(dtype)
        exact = y.double() + x.double() @ w.double().t()
        size = y.double().abs() + x.double().abs() @ w.double().abs().t()
        close(gemm(x, w, y, add=True), (exact, size, K + 1))


@pytest.mark.parametrize("w_is", ["along k", "along n"])
@pytest.mark.parametrize("dtype", GEMM_DTYPES)
def test_gemm_has_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, w_is: str) -> None:
    for M, N, K in [*GEMM_SHAPES, (1030, 300, 2113)]:
        x, w, y = gemm_operands(M, N, K, dtype, w_is)
        want = gemm(x, w, y, threads=1).clone()
        for threads in (1, 2, 3, 7):
            assert torch.equal(gemm(x, w, y.fill_(math.nan), threads), want)


@pytest.mark.parametrize(("M", "K"), [(48, 200), (48, 768), (16, 4096), (48, 4096)])
@pytest.mark.parametrize("dtype", GEMM_DTYPES)
def test_gemm_is_as_exact_as_torch(dtype: torch.dtype, M: int, K: int) -> None:
    """No sum has a longer chain of additions than MKL's. oneDNN adds up all of K in one chain, which has up to 2.2
    times this error in fp32."""
    x, w, y = gemm_operands(M, 512, K, dtype, "along k")
    exact = x.double() @ w.double().t()
    error, plain = ((t.double() - exact).square().mean().sqrt() for t in (gemm(x, w, y), x @ w.t()))
    assert error <= 1.25 * plain
