"""The experts of one layer in GEMMs of torch, one expert after the other: the part of the eager back-end for them.

    h_e = c · (keep ⊙ x_e) a_eᵀ          y_e = x_e w_eᵀ + bias_e, then y_e += s · h_e b_eᵀ in place
    g_e = s · dy_e b_e                   dx_e = dy_e w_e, then dx_e += c · keep ⊙ (g_e a_e) in place
    da_e = c · g_eᵀ (keep ⊙ x_e)         db_e = s · dy_eᵀ h_e

x_e are the rows of expert e, which follow each other. Every product is written to its place in the result, so that
nothing of the size of y, or of w, is made beside it. A w of another dtype is converted expert by expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.backends.products import add_product, product, transposed_product
from lora_kernels.core import dropout
from lora_kernels.core.operands import Adapter, Base, ExpertGradients, MultiResult, Needs
from lora_kernels.core.rows import Rows


def forward_experts(x: Tensor, base: Base, adapter: Adapter, rows: Rows, save_h: bool) -> MultiResult:
    """Return (y, h)."""
    (M, _), (a, b, scale, p, _) = x.shape, adapter
    y = x.new_empty(M, b.shape[1])
    h = a.new_empty(M, a.shape[1]) if save_h else None
    base_forward(y, x, base, rows)
    for e, first, last in rows.spans():
        own_x = _masked(x[first:last], adapter, first)
        own_h = product(own_x, a[e].t(), dropout.rescale(p), a.dtype)
        add_product(y[first:last], own_h, b[e].t(), scale)
        if h is not None:
            h[first:last] = own_h
    return y, without_rest(h, rows)


def backward_experts(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, rows: Rows, h: Tensor | None, needs: Needs
) -> ExpertGradients:
    """Return (dx, da, db). Those of an expert without rows are zeros."""
    a, b, scale, p, _ = adapter
    need_dx, (need_da,), (need_db,) = needs
    da = torch.zeros_like(a, memory_format=torch.contiguous_format) if need_da else None
    db = torch.zeros_like(b, memory_format=torch.contiguous_format) if need_db else None
    dx = dy.new_empty(dy.shape[0], a.shape[2]) if need_dx else None
    if dx is not None:
        base_backward(dx, dy, base, rows)
    for e, first, last in rows.spans():
        own_dy = dy[first:last]
        if need_dx or need_da:
            g = product(own_dy, b[e], scale, b.dtype)
        if dx is not None and p > 0:
            low = product(g, a[e], dropout.rescale(p), dy.dtype)
            dx[first:last] += _masked(low, adapter, first)
        elif dx is not None:
            add_product(dx[first:last], g, a[e])
        if da is not None:
            assert x is not None
            own_x = _masked(x[first:last], adapter, first)
            da[e] = transposed_product(g, own_x, dropout.rescale(p), a.dtype)
        if db is not None:
            assert h is not None
            db[e] = transposed_product(own_dy, h[first:last], scale, b.dtype)
    return dx, da, db


def base_forward(y: Tensor, x: Tensor, base: Base, rows: Rows) -> None:
    """Write x_e w_eᵀ + bias_e to the rows of each expert in y, and zeros to the rest."""
    w, bias = base
    assert isinstance(w, Tensor), "no experts are quantised"
    for e, first, last in rows.spans():
        w_t = as_of(w[e], x).t()
        if bias is None:
            torch.mm(x[first:last], w_t, out=y[first:last])
        else:
            torch.addmm(bias[e], x[first:last], w_t, out=y[first:last])
    without_rest(y, rows)


def base_backward(dx: Tensor, dy: Tensor, base: Base, rows: Rows) -> None:
    """Write dy_e w_e to the rows of each expert in dx, and zeros to the rest."""
    w = base.w
    assert isinstance(w, Tensor), "no experts are quantised"
    for e, first, last in rows.spans():
        torch.mm(dy[first:last], as_of(w[e], dy), out=dx[first:last])
    without_rest(dx, rows)


def without_rest(t: Tensor | None, rows: Rows) -> Tensor | None:
    """Return `t` with zeros in the rows that no expert has."""
    if t is not None:
        t[sum(rows.counts) :] = 0
    return t


def as_of(w: Tensor, like: Tensor) -> Tensor:
    """Return w in the dtype of `like`."""
    return w if w.dtype == like.dtype else w.to(like.dtype)


def _masked(x: Tensor, adapter: Adapter, first: int) -> Tensor:
    """Return keep ⊙ x for the rows of one expert, of which the first is row `first` of all."""
    if adapter.p == 0:
        return x
    assert adapter.seed is not None
    return dropout.masked(x, adapter.p, adapter.seed, first)
