"""A launch that computes the base products of many rows together with the low-rank half: its bits are those of our own
GEMM followed by that half, and its values those of the equation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels were not built on this machine")
from support.native_problems import SEED  # noqa: E402

from lora_kernels import quantize_weight  # noqa: E402
from lora_kernels.backends import cpu  # noqa: E402
from lora_kernels.core import dropout  # noqa: E402
from lora_kernels.core.operands import Adapter, Base, Needs  # noqa: E402
from lora_kernels.quant.weight import QuantizedWeight  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)
SIZES = [(17, 33, 45, 3), (67, 300, 1000, 16), (210, 513, 64, 33), (97, 96, 128, 1), (211, 30, 400, 5)]
"""M, N, K, R: columns that end within a group of keep bits, rows that end within a part, and so few
columns that threads share the rows."""


def nan(like: Tensor, rows: int, cols: int) -> Tensor:
    return torch.full((rows, cols), math.nan, dtype=like.dtype)


def product(x: Tensor, w: Tensor | QuantizedWeight, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return x wᵀ + bias, or out + x wᵀ, by our own GEMM."""
    if isinstance(w, QuantizedWeight):
        y = nan(x, x.shape[0], w.shape[0])
        _C.quantized_gemm(2, x, w, False, y, bias)
        return y
    y = nan(x, x.shape[0], w.shape[0]) if out is None else out
    _C.gemm(2, x, w, y, out is not None, bias)
    return y


class Layers:
    """Layers over one x, whose results start as NaN."""

    def __init__(self, M: int, N: int, K: int, R: int, dtype: torch.dtype, p: float, count: int, strided: bool = False):
        torch.manual_seed(M)
        w = [torch.randn(K, N).t() if strided else torch.randn(N, K + 1)[:, :K] for _ in range(count)]
        self.x, self.dys = torch.randn(M, K + 3).to(dtype)[:, :K], [torch.randn(M, N).to(dtype) for _ in w]
        self.bases = [Base(t.to(dtype), torch.randn(N).to(dtype)) for t in w]
        adapters = [(torch.randn(R, K).to(dtype), torch.randn(N, R).to(dtype)) for _ in w]
        self.adapters = [Adapter(a, b, 0.75, p, torch.tensor(SEED) if p else None) for a, b in adapters]
        self.hs = [torch.randn(M, R).to(dtype) for _ in w]

    def forward(self, threads: int, bases: list[Base], ys: list[Tensor], launched: list[bool]) -> list[Tensor]:
        hs = [nan(h, *h.shape) for h in self.hs]
        _C.forward(threads, self.x, bases, self.adapters, ys, hs, launched)
        return [*ys, *hs]

    def backward(self, threads: int, dx: Tensor, launched: list[bool]) -> list[Tensor]:
        das, dbs = ([nan(t, *t.shape) for t in (q[i] for q in self.adapters)] for i in (0, 1))
        _C.backward(threads, self.dys, self.x, self.bases, self.adapters, self.hs, dx, das, dbs, launched)
        return [dx, *das, *dbs]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_the_gemm_and_the_low_rank_half(isa: str, dtype: torch.dtype, p: float) -> None:
    """Whatever the number of threads, and where the launch has the base product of one of two layers only."""
    if not _C.has_gemm(dtype):
        pytest.skip("this instruction set has no GEMM of many rows for it")
    for number, (M, N, K, R) in enumerate(SIZES):
        q = Layers(M, N, K, R, dtype, p, 2, strided=number % 2 == 1)
        late = dtype == torch.float32  # the low-rank half adds the bias there
        ys = [product(q.x, w, None if late else bias) for w, bias in q.bases]
        done = [Base(w, bias if late else None) for w, bias in q.bases]
        want = q.forward(1, done, [y.clone() for y in ys], [False, False])
        (w0, _), (w1, _) = q.bases
        one = product(q.dys[0], w0.t())
        dx = product(q.dys[1], w1.t(), out=one.clone())
        gradients = q.backward(1, dx, [False, False])
        for threads in (1, 2, 5):
            empty = [nan(y, *y.shape) for y in ys]
            assert all(map(torch.equal, q.forward(threads, q.bases, empty, [True, True]), want))
            half = q.forward(threads, [done[0], q.bases[1]], [ys[0].clone(), nan(ys[1], M, N)], [False, True])
            assert all(map(torch.equal, half, want))
            assert all(map(torch.equal, q.backward(threads, nan(dx, M, K), [True, True]), gradients))
            assert all(map(torch.equal, q.backward(threads, one.clone(), [False, True]), gradients))


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_over_codes_are_those_of_the_gemm_too(isa: str, dtype: torch.dtype, format: str) -> None:
    if not _C.has_gemm(dtype):
        pytest.skip("this instruction set has no GEMM of many rows for it")
    q = Layers(67, 96, 256, 9, dtype, 0.3, 1)
    w = quantize_weight(torch.randn(96, 256), format)
    q.bases, done = [Base(w)], [Base(w)]
    want = q.forward(1, done, [product(q.x, w)], [False])
    dx = nan(q.x, 67, 256)
    _C.quantized_gemm(1, q.dys[0], w, True, dx, None)
    gradients = q.backward(1, dx, [False])
    for threads in (1, 3):
        assert all(map(torch.equal, q.forward(threads, q.bases, [nan(want[0], 67, 96)], [True]), want))
        assert all(map(torch.equal, q.backward(threads, nan(dx, 67, 256), [True]), gradients))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("strided", [False, True])
def test_both_ways_give_the_equation(isa: str, strided: bool, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way the clock chooses, y = x Wᵀ + bias + s x̂ Aᵀ Bᵀ, and its gradients."""
    M, N, K, R = 70, 130, 90, 5
    q = Layers(M, N, K, R, torch.float32, p, 1, strided)
    x, (w, bias), (a, b, s, *_), dy = q.x.double(), q.bases[0], q.adapters[0], q.dys[0].double()
    w, a, b = w.double(), a.double(), b.double()
    kept = dropout.keep_mask(torch.tensor(SEED), M, K, p) * dropout.rescale(p) if p else torch.ones(M, K)
    g = s * dy @ b
    want = [x @ w.t() + bias + s * (kept * x) @ a.t() @ b.t(), dy @ w + kept * (g @ a), g.t() @ (kept * x)]
    want.append(s * dy.t() @ (kept * x @ a.t()))
    for choice in ("torch", "own"):
        calls: list[str] = []
        monkeypatch.setattr(cpu.launch, "chosen", lambda _, kind, *rest, k=calls, c=choice: k.append(kind) or c)
        monkeypatch.setattr(cpu.gemm, "chosen", lambda *_, c=choice: c)
        (y,), hs = cpu.forward(q.x, q.bases, q.adapters, [True])
        dx, (da,), (db,) = cpu.backward(q.dys, q.x, q.bases, q.adapters, hs, Needs(True, (True,), (True,)))
        assert calls == [f"float32 {name}{' with dropout' if p else ''}" for name in ("forward", "backward")]
        for got, exact in zip((y, dx, da, db), want, strict=True):
            assert (got.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_a_launch_refuses_a_weight_of_another_dtype_or_size() -> None:
    q = Layers(20, 12, 8, 2, torch.float32, 0.0, 1)
    y = nan(q.x, 20, 12)
    for w, error in ((torch.ones(12, 8).double(), TypeError), (torch.ones(12, 8).bfloat16(), TypeError)):
        with pytest.raises(error):
            q.forward(1, [Base(w)], [y], [True])
    with pytest.raises(ValueError, match="w"):
        q.forward(1, [Base(torch.ones(12, 9))], [y], [True])
    assert y.isnan().all()
