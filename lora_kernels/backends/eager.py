"""Vendor GEMMs called from Python: any device, any floating dtype; the honest baseline.

Without dropout there is no elementwise pass: the low-rank terms are added by ``addmm_`` into what the base GEMM wrote.
With dropout the mask is drawn by torch operations, which is slow; the other back-ends exist for that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import random
from lora_kernels.backends import Call

name = "eager"

_ROWS = 1024
"""Rows of x or dy converted to fp32 at a time, where fp32 adapters stand beside a 16-bit x."""


def why_not(call: Call) -> list[str]:
    return []


def forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    save_h: bool,
) -> tuple[Tensor, Tensor | None]:
    y = F.linear(x, w, bias)
    h = _masked(x, p, seed) @ a.to(x.dtype).t()
    if p > 0:
        h *= random.rescale(p)
    y.addmm_(h, b.to(x.dtype).t(), alpha=scale)
    return y, h if save_h else None


def backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor,
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
        dx = dy @ w
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


def _masked(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """keep ⊙ x."""
    if p == 0:
        return x
    assert seed is not None
    M, K = x.shape
    return torch.where(random.keep_mask(seed, M, K, p), x, x.new_zeros(()))


def _transposed_product(u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """uᵀ v in `dtype`, without rounding through u's dtype where `dtype` is wider: in blocks of rows, so that no operand
    is copied whole."""
    if dtype == u.dtype:
        return u.t() @ v
    out = torch.zeros(u.shape[1], v.shape[1], dtype=dtype, device=u.device)
    for m in range(0, u.shape[0], _ROWS):
        out.addmm_(u[m : m + _ROWS].to(dtype).t(), v[m : m + _ROWS].to(dtype))
    return out
