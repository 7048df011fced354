"""Products of matrices by torch, each rounded once, with a factor. Operands of two dtypes are multiplied in the wider
one."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1024
"""The number of rows that are computed in fp32 at a time, where the adapters are fp32 and x has 16 bits."""


def product(u: Tensor, v: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """Return alpha · u v in `dtype`. alpha is applied before the rounding.

    Where the dtypes differ, blocks of rows are computed in the wider one after another, so that u is not copied whole.
    """
    if u.dtype == v.dtype == dtype:
        return _mm(u, v, alpha)
    out = torch.empty(u.shape[0], v.shape[1], dtype=dtype, device=u.device)
    wide = torch.promote_types(u.dtype, v.dtype)
    v = v.to(wide)
    for m in range(0, u.shape[0], _ROWS):
        out[m : m + _ROWS] = (u[m : m + _ROWS].to(wide) @ v).mul_(alpha)
    return out


def add_product(y: Tensor, u: Tensor, v: Tensor, alpha: float = 1.0) -> None:
    """Add alpha · u v to y in place. u and v have y's dtype, or are fp32 beside a y in 16 bits."""
    if u.dtype == y.dtype:
        y.addmm_(u, v, alpha=alpha)
        return
    for m in range(0, y.shape[0], _ROWS):
        y[m : m + _ROWS].add_(u[m : m + _ROWS] @ v, alpha=alpha)


def transposed_product(u: Tensor, v: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """Return alpha · uᵀ v in `dtype`. alpha is applied before the rounding.

    Where the dtypes differ, blocks of rows are converted one after another, so that no operand is copied whole.
    """
    if u.dtype == v.dtype == dtype:
        return _mm(u.t(), v, alpha)
    out = torch.zeros(u.shape[1], v.shape[1], dtype=dtype, device=u.device)
    for m in range(0, u.shape[0], _ROWS):
        out.addmm_(u[m : m + _ROWS].to(dtype).t(), v[m : m + _ROWS].to(dtype))
    return out.mul_(alpha)


def _mm(u: Tensor, v: Tensor, alpha: float) -> Tensor:
    """Return alpha · u v, rounded once."""
    return u @ v if alpha == 1 else torch.addmm(u.new_empty(1, 1), u, v, beta=0, alpha=alpha)
