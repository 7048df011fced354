"""Vendor GEMMs called from Python: any device, any floating dtype; the honest baseline.

Without dropout there is no elementwise pass: the low-rank terms are added by ``addmm_`` into what the base GEMM wrote.
With dropout the mask is drawn by torch operations, a few megabytes at a time: slow, and what the other back-ends exist
for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.backends.each import backward_each, forward_each
from lora_kernels.core import dropout as random
from lora_kernels.core.operands import Adapter, Base, Call, Needs
from lora_kernels.quant.weight import QuantizedWeight

name = "eager"

_ROWS = 1024
"""Rows of x or dy converted to fp32 at a time, where fp32 adapters stand beside a 16-bit x."""

_ELEMENTS = 1 << 22
"""Of a quantised w dequantised at a time."""


def why_not(call: Call) -> list[str]:
    return []


def forward(
    x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], save_h: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    return forward_each(_forward, x, bases, adapters, save_h)


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    bases: Sequence[Base],
    adapters: Sequence[Adapter],
    hs: Sequence[Tensor | None],
    needs: Needs,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    return backward_each(_backward, dys, x, bases, adapters, hs, needs)


def _forward(x: Tensor, base: Base, adapter: Adapter, save_h: bool) -> tuple[Tensor, Tensor | None]:
    (w, bias), (a, b, scale, p, seed) = base, adapter
    y = F.linear(x, w, bias) if isinstance(w, Tensor) else _quantised(x, w, bias)
    h = _masked(x, p, seed) @ a.to(x.dtype).t()
    if p > 0:
        h *= random.rescale(p)
    y.addmm_(h, b.to(x.dtype).t(), alpha=scale)
    return y, h if save_h else None


def _backward(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, h: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    w, (a, b, scale, p, seed) = base.w, adapter
    need_dx, (need_da,), (need_db,) = needs
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


def keep_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return random.keep_mask(seed, x.shape[0], x.shape[1], p).to(x.dtype)


def base_gemm(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


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
