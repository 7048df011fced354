"""Vendor GEMMs called from Python: any device, any floating dtype; the honest baseline.

Without dropout there is no elementwise pass: the low-rank terms are added by ``addmm_`` into what the base GEMM wrote.
With dropout the mask is drawn by torch operations, a few megabytes at a time: slow, and what the other back-ends exist
for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import random
from lora_kernels.backends import Call
from lora_kernels.quant import QuantizedWeight

name = "eager"

_ROWS = 1024
"""Rows of x or dy converted to fp32 at a time, where fp32 adapters stand beside a 16-bit x."""

_ELEMENTS = 1 << 22
"""Of a quantised w dequantised at a time."""


def why_not(call: Call) -> list[str]:
    return []


def forward(
    x: Tensor,
    w: Tensor | QuantizedWeight,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    save_h: bool,
) -> tuple[Tensor, Tensor | None]:
    y = F.linear(x, w, bias) if isinstance(w, Tensor) else _quantised(x, w, bias)
    h = _masked(x, p, seed) @ a.to(x.dtype).t()
    if p > 0:
        h *= random.rescale(p)
    y.addmm_(h, b.to(x.dtype).t(), alpha=scale)
    return y, h if save_h else None


def backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | QuantizedWeight,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = da = db = None
    if need_dx or need_da:
        g = dy @ b.to(dy.dtype)
        g *= scale
    if need_dx:
        dx = dy @ w if isinstance(w, Tensor) else _quantised_transposed(dy, w)
        if p > 0:
            low = (g @ a.to(dy.dtype)).mul_(random.rescale(p))
            dx += _masked(low, p, seed)
        else:
            dx.addmm_(g, a.to(dy.dtype))
    if need_da:
        assert x is not None
        da = _transposed_product(g, _masked(x, p, seed), a.dtype)
        if p > 0:
            da *= random.rescale(p)
    if need_db:
        assert h is not None
        db = _transposed_product(dy, h, b.dtype)
        db *= scale
    return dx, da, db


def _blocks(w: QuantizedWeight) -> list[tuple[int, int]]:
    N, K = w.shape
    step = max(1, _ELEMENTS // K)
    return [(n, min(N, n + step)) for n in range(0, N, step)]


def _quantised(x: Tensor, w: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, W dequantised a few rows at a time."""
    y = x.new_empty(x.shape[0], w.shape[0])
    for first, last in _blocks(w):
        y[:, first:last] = F.linear(x, w.rows(first, last, x.dtype), None if bias is None else bias[first:last])
    return y


def _quantised_transposed(dy: Tensor, w: QuantizedWeight) -> Tensor:
    """dy W, the parts summed in fp32."""
    blocks = _blocks(w)
    if len(blocks) == 1:
        return dy @ w.rows(*blocks[0], dy.dtype)
    wide = torch.promote_types(dy.dtype, torch.float32)
    dx = torch.zeros(dy.shape[0], w.shape[1], dtype=wide, device=dy.device)
    for first, last in blocks:
        dx.addmm_(dy[:, first:last].to(wide), w.rows(first, last, wide))
    return dx.to(dy.dtype)


def _masked(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """keep ⊙ x."""
    if p == 0:
        return x
    assert seed is not None
    return random.masked(x, p, seed)


def _transposed_product(u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """uᵀ v in `dtype`, without rounding through u's dtype where `dtype` is wider: in blocks of rows, so that no operand
    is copied whole."""
    if dtype == u.dtype:
        return u.t() @ v
    out = torch.zeros(u.shape[1], v.shape[1], dtype=dtype, device=u.device)
    for m in range(0, u.shape[0], _ROWS):
        out.addmm_(u[m : m + _ROWS].to(dtype).t(), v[m : m + _ROWS].to(dtype))
    return out
