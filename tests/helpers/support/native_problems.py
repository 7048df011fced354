"""Operands for single calls of the native CPU kernels, and the bound that rounding sets to their results."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lora_kernels import _C
from lora_kernels.core import dropout
from lora_kernels.core.operands import Adapter, Base

X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Bound = tuple[Tensor, Tensor, int]
"""A result in fp64, the sum of the magnitudes of its terms, and the number of its terms."""
SEED = 0x0123_4567_89AB_CDEF


class Operands:
    """Operands whose rows are not adjacent in memory. y and dx hold a base product, and other results start as NaN."""

    def __init__(
        self,
        M: int,
        N: int,
        K: int,
        R: int,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        p: float,
        scale: float = 0.75,
    ):
        generator = torch.Generator().manual_seed(M * 7 + N)

        def draw(rows: int, cols: int, dtype: torch.dtype, std: float = 1.0, pad: int = 0) -> Tensor:
            return (torch.randn(rows, cols + pad, generator=generator) * std).to(dtype)[:, :cols]

        self.sizes, self.p, self.scale = (M, N, K, R), p, scale
        self.x, self.dy = draw(M, K, dtype, pad=3), draw(M, N, dtype, pad=5)
        self.a, self.b = draw(R, K, adapter_dtype, K**-0.5, pad=1), draw(N, R, adapter_dtype, R**-0.5, pad=2)
        self.h, self.y, self.dx = draw(M, R, dtype, pad=1), draw(M, N, dtype), draw(M, K, dtype)
        self.bias = torch.randn(N, generator=generator).to(dtype)
        self.seed = torch.tensor(SEED)
        self.nan = lambda rows, cols, dtype: torch.full((rows, cols), math.nan, dtype=dtype)

    def adapter(self) -> Adapter:
        return Adapter(self.a, self.b, self.scale, self.p, self.seed)

    def forward(self, threads: int = 2) -> tuple[Tensor, Tensor]:
        """Return (y, h)."""
        h = self.nan(*self.h.shape, self.x.dtype)
        y = self.y.clone()
        bases = [Base(self.a, self.bias)]  # y holds the base product already, so w is not read
        _C.forward(threads, self.x, bases, [self.adapter()], [y], [h], [False])
        return y, h

    def backward(self, threads: int = 2, dx: bool = True, da: bool = True, db: bool = True) -> dict[str, Tensor]:
        out = {}
        if dx:
            out["dx"] = self.dx.clone()
        if da:
            out["da"] = self.nan(*self.a.shape, self.a.dtype)
        if db:
            out["db"] = self.nan(*self.b.shape, self.b.dtype)
        results = out.get("dx"), [out.get("da")], [out.get("db")]
        x, h = self.x if da else None, self.h if db else None
        _C.backward(threads, [self.dy], x, [Base(self.a)], [self.adapter()], [h], *results, [False])
        return out


def masked(q: Operands) -> Tensor:
    """Return x̂ in fp64."""
    M, _, K, _ = q.sizes
    return q.x.double() * dropout.keep_mask(q.seed, M, K, q.p) * dropout.rescale(q.p) if q.p else q.x.double()


@functools.cache
def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, adapter_dtype: torch.dtype, p: float
) -> tuple[Operands, dict[str, Bound]]:
    """Return the operands, and the bound of every result."""
    q = Operands(*shape, dtype, adapter_dtype, p)
    M, N, K, R = shape
    x, dy, a, b, h, y, dx = masked(q), *(getattr(q, name).double() for name in ("dy", "a", "b", "h", "y", "dx"))
    y = torch.stack([y, q.bias.double().expand_as(y)])  # two terms, each with its own magnitude
    keep = dropout.keep_mask(q.seed, M, K, p) * dropout.rescale(p) if p else torch.ones(M, K)
    s = q.scale

    def both(f) -> tuple[Tensor, Tensor]:
        return f(x, dy, a, b, h, y, dx), f(*(t.abs() for t in (x, dy, a, b, h, y, dx)))

    return q, {
        "h": (*both(lambda x, dy, a, b, h, y, dx: x @ a.t()), K),
        "y": (*both(lambda x, dy, a, b, h, y, dx: y.sum(0) + s * x @ a.t() @ b.t()), K + R),
        "dx": (*both(lambda x, dy, a, b, h, y, dx: dx + keep * (s * dy @ b @ a)), N + R),
        "da": (*both(lambda x, dy, a, b, h, y, dx: (s * dy @ b).t() @ x), N + M),
        "db": (*both(lambda x, dy, a, b, h, y, dx: s * dy.t() @ h), M),
    }


def close(got: Tensor, bound: Bound, through_bf16: bool = False) -> None:
    """Assert that the error of `got` is at most that of an fp32 sum of n products, n · 2⁻²⁴ · Σ|products|, and of one
    rounding to its dtype. Where h or g passes through bf16, the bound grows by one rounding to bf16."""
    want, magnitude, terms = bound
    assert not torch.isnan(got).any()
    fp32 = ((4 + terms) * 2**-24 + (2**-8 if through_bf16 else 0)) * magnitude
    rounding = (
        torch.finfo(got.dtype).eps / 2 * (want.abs() + fp32)
        + torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    )
    assert ((got.double() - want).abs() <= fp32 + rounding).all()


def gemm(x: Tensor, w: Tensor, y: Tensor, threads: int = 2, add: bool = False) -> Tensor:
    _C.gemm(threads, x, w, y, add, None)
    return y


def gemm_serves(x: Tensor, w: Tensor) -> bool:
    return _C.has_gemm(x.dtype) or (x.shape[0] <= _C.FEW_ROWS and w.stride(1) == 1)


def gemm_operands(M: int, N: int, K: int, dtype: torch.dtype, w_is: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(M + N)
    x = torch.randn(M, K + 3, generator=generator).to(dtype)[:, :K]
    w = torch.randn(N, 2 * K + 1, generator=generator).to(dtype)
    w = {"along k": w[:, :K], "along n": w.t().contiguous().t()[:, :K], "strided": w[:, : 2 * K : 2]}[w_is]
    return x, w, torch.full((M, N), math.nan, dtype=dtype)
