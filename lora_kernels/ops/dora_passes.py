"""The passes over matrices that DoRA adds to LoRA, in torch operations.

What has 16 bits is computed in fp32 and rounded once, in blocks of rows, so that nothing of size M×N or M×K is
allocated in fp32. A compiler fuses the whole instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_kernels.core import dropout
from lora_kernels.ops.direct import base_gemm
from lora_kernels.ops.sums import column_sum, fixed

_BLOCK = {"cpu": 1 << 18}
"""The number of elements of a block, by device type: on a CPU they stay in its cache. Other devices take 2²⁴."""


def scaled_rows(b: Tensor, d: Tensor) -> Tensor:
    """Return d ⊙ B [N, R], in B's dtype."""
    return (b * d[:, None]).to(b.dtype)


def excess(d: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return c·(d - 1) [N]. The difference is formed before it is rounded to 16 bits."""
    return ((d - 1) * dropout.rescale(p)).to(dtype)


def add_scaled(addend: Tensor | None, v: Tensor, factor: Tensor, out: Tensor | None) -> Tensor:
    """Return addend + v ⊙ factor for v [M, N] in 16 bits, a factor [N] in fp32, and an addend [N] or [M, N]. The result
    is written into `out`, if that is given, except under a compiler."""
    wide = factor.dtype
    if torch.compiler.is_compiling():
        scaled = v.to(wide) * factor
        return (scaled if addend is None else scaled + addend).to(v.dtype)
    out = torch.empty_like(v) if out is None else out
    for rows in _blocks(v):
        scaled = v[rows] * factor
        if addend is not None:
            scaled += addend if addend.dim() == 1 else addend[rows]
        out[rows] = scaled
    return out


def add_low_rank(
    addend: Tensor | None, u: Tensor, factor: Tensor, x: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (addend + u ⊙ factor + h Bᵀ, h) with h = x Aᵀ in fp32, for u [M, N] and x [M, K] in 16 bits, fp32 A and B,
    and a factor and an addend [N] in fp32."""
    if torch.compiler.is_compiling():
        h = x.to(a.dtype) @ a.t()
        y = u.to(a.dtype) * factor + h @ b.t()
        return (y if addend is None else y + addend).to(u.dtype), h
    y, h = torch.empty_like(u), a.new_empty(x.shape[0], a.shape[0])
    for rows in _blocks(u):
        h[rows] = _product(x[rows].to(a.dtype), a)
        sum_ = u[rows] * factor
        sum_ += _product(h[rows], b)
        if addend is not None:
            sum_ += addend
        y[rows] = sum_
    return y, h


def column_dot(u: Tensor, v: Tensor | None, minus: Tensor | None = None) -> Tensor:
    """Return Σₘ u ⊙ (v - minus) [N] for `minus` [N], summed in fp32 at least."""
    assert v is not None, "it is saved where d needs a gradient"
    wide = torch.promote_types(u.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return (u.to(wide) * (v.to(wide) if minus is None else v.to(wide) - minus)).sum(0)
    out = u.new_zeros(u.shape[1], dtype=wide)
    for rows in _blocks(u):
        block = v[rows].to(wide)
        out += column_sum(u[rows].to(wide) * (block if minus is None else block - minus))
    return out


def _blocks(u: Tensor) -> Iterator[slice]:
    """Return the rows of u [M, N] that are computed at a time, in order."""
    M, N = u.shape
    rows = max(1, _BLOCK.get(u.device.type, 1 << 24) // N)
    return (slice(m, m + rows) for m in range(0, M, rows))


def _product(u: Tensor, v: Tensor) -> Tensor:
    """Return u vᵀ in fp32. MKL divides such products among its threads along K, which changes bits."""
    return base_gemm(u, v, None) if fixed(u) else u @ v.t()
