"""The forward and the backward of an embedding with LoRA or DoRA.

    forward    h = Aᵀ[ids]                           y = e · d ⊙ (E[ids] + s · h Bᵀ)        e = embed_scale
    backward   g = s·e · (dy (d ⊙ B))                da[:, id] = Σ over the places of id of gᵀ
               low = s·e · dyᵀ h                     db = d ⊙ low
               dd = rowsum(low ⊙ B) + e · Σₘ dy ⊙ E[ids]

d is left out without DoRA. The rows of padding_idx of h and g are zero. What has 16 bits is computed in fp32 and
rounded once, in blocks of rows, so that nothing of size M×D is allocated beside y. On a CPU the kernels of the low-rank
half of a linear layer compute the products in fp32, and g and low in one pass over dy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.autograd import as_dtype
from lora_kernels.ops.direct import base_gemm
from lora_kernels.ops.dora_passes import scaled_rows
from lora_kernels.ops.sums import column_sum, fixed

_BLOCK = {"cpu": 1 << 18}
"""The number of elements of a block, by device type: on a CPU they stay in its cache. Other devices take 2²²."""


class Table(NamedTuple):
    """The operands of a call."""

    ids: Tensor
    """[M]"""
    w: Tensor
    """E [V, D]."""
    a_t: Tensor
    """Aᵀ [V, R]."""
    b: Tensor
    """[D, R]"""
    d: Tensor | None
    """[D] in fp32 at least, with DoRA."""
    factor: Tensor | None
    """embed_scale, where it is a tensor; `embed_scale` is then 1."""
    scale: float
    embed_scale: float
    padding_idx: int | None


def without_row(a_t: Tensor, row: int | None) -> Tensor:
    """Return Aᵀ with zeros in a row: a copy, of size V×R. `a_t` itself where `row` is None."""
    if row is None:
        return a_t
    return a_t.masked_fill((torch.arange(a_t.shape[0], device=a_t.device) == row)[:, None], 0)


def is_turned(a_t: Tensor) -> bool:
    """Return whether Aᵀ is the transposed view of an A [R, V], which then is what is read and written."""
    V, R = a_t.shape
    return a_t.stride(0) == 1 and (R == 1 or a_t.stride(1) >= V) and V > 1


def forward(table: Table, save_h: bool) -> tuple[Tensor, Tensor | None]:
    """Return (y [M, D], h [M, R]); h is None unless `save_h`."""
    ids, w, a_t, b, d, _, scale, _, padding_idx = table
    h = a_t.t().index_select(1, ids).t().contiguous() if is_turned(a_t) else a_t.index_select(0, ids)
    if padding_idx is not None:
        h.masked_fill_((ids == padding_idx)[:, None], 0)
    wide, e = torch.promote_types(w.dtype, torch.float32), _embed_scale(table)
    b = as_dtype(b, wide)
    if wide == w.dtype:
        y = _finish(w.index_select(0, ids), h, b, scale, d, e)
        return y, h if save_h else None
    y = w.new_empty(ids.shape[0], w.shape[1])
    for rows in _blocks(y):
        y[rows] = _finish(w.index_select(0, ids[rows]).to(wide), as_dtype(h[rows], wide), b, scale, d, e)
    return y, h if save_h else None


def backward(
    dy: Tensor, table: Table, h: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (da_t [V, R], db [D, R], dd [D]) of dy [M, D]; a gradient that `needs` does not ask for is None."""
    ids, w, a_t, b, d, _, scale, _, padding_idx = table
    need_da, need_db, need_dd = needs
    wide, e = torch.promote_types(w.dtype, torch.float32), _embed_scale(table)
    s = scale * e
    b = as_dtype(b, wide)
    b_d = b if d is None else scaled_rows(b, d)
    h = None if h is None or not (need_db or need_dd) else as_dtype(h, wide)
    dd = b.new_zeros(b.shape[0]) if need_dd else None
    gs, low = [], None
    whole = dy.dtype == wide and not need_dd and dy.is_contiguous()
    for rows in (slice(None),) if whole else _blocks(dy):
        block = as_dtype(dy[rows], wide).contiguous()
        g, part = _products(block, None if h is None else h[rows], b_d, need_da)
        gs.append(g)
        low = part if low is None else low.add_(part)
        if dd is not None:
            dd += column_sum(w.index_select(0, ids[rows]).to(wide).mul_(block))
    da_t = db = None
    if need_da:
        g = torch.cat(gs) if len(gs) > 1 else gs[0]
        da_t = _scattered(g.mul_(s), ids, a_t, padding_idx)
    if low is not None:
        low.mul_(s)
        if dd is not None:
            dd = dd.mul_(e).add_((low * b).sum(1)).to(torch.promote_types(a_t.dtype, torch.float32))
        if need_db:
            db = as_dtype(low if d is None else low * d[:, None], table.b.dtype)
    return da_t, db, dd


def _finish(y: Tensor, h: Tensor, b: Tensor, scale: float, d: Tensor | None, e: float | Tensor) -> Tensor:
    """Return e · d ⊙ (y + scale · h Bᵀ), in y's memory."""
    kernels = _kernels(y)
    if kernels is not None:
        kernels.add_product(y, h, b.contiguous(), scale)
    else:
        y.addmm_(h, b.t(), alpha=scale)
    if d is not None:
        y.mul_(d)
    return y if isinstance(e, float) and e == 1 else y.mul_(e)


def _products(dy: Tensor, h: Tensor | None, b: Tensor, need_g: bool) -> tuple[Any, Any]:
    """Return (dy B [M, R], dyᵀ h [D, R]); the first is None unless `need_g`, the second where h is None."""
    if not need_g and h is None:
        return None, None
    kernels = _kernels(dy)
    if kernels is not None:
        return kernels.gradients(dy, h, b.contiguous(), need_g)
    # MKL divides these products among its threads along K, which changes bits.
    product = functools.partial(base_gemm, backend=None) if fixed(dy) else _product
    return product(dy, b.t()) if need_g else None, None if h is None else product(dy.t(), h.t())


def _product(u: Tensor, v: Tensor) -> Tensor:
    """Return u vᵀ."""
    return u @ v.t()


def _kernels(t: Tensor) -> Any:
    """Return the module of the kernels that serve products with `t`, or None where torch computes them."""
    return native() if t.is_cpu and t.dtype == torch.float32 and t.shape[0] > 0 else None


@functools.cache
def native() -> Any:
    """Return the module of the native kernels for a CPU, or None where they are not built."""
    try:
        from lora_kernels.backends.cpu import low_rank
    except ImportError:
        return None
    return low_rank


def _scattered(g: Tensor, ids: Tensor, a_t: Tensor, padding_idx: int | None) -> Tensor:
    """Return da_t [V, R], in which the rows of g [M, R] with the same id are added in their order."""
    V, R = a_t.shape
    if padding_idx is not None:
        g.masked_fill_((ids == padding_idx)[:, None], 0)
    if is_turned(a_t) and g.is_cpu:
        sums = g.new_zeros(R, V).index_add_(1, ids, g.t()).t()
    else:  # index_add_ adds with atomics on a GPU; torch's backward of an embedding sorts the ids
        sums = torch.ops.aten.embedding_dense_backward.default(g, ids, V, -1, False)
        if is_turned(a_t):
            sums = sums.t().contiguous().t()
    return as_dtype(sums, a_t.dtype)


def _embed_scale(table: Table) -> float | Tensor:
    """Return embed_scale. A tensor is rounded to E's dtype, because the layers that have one round it."""
    factor, dtype = table.factor, table.w.dtype
    if factor is None:
        return table.embed_scale
    return factor.reshape(()).to(dtype).to(torch.promote_types(dtype, torch.float32))


def _blocks(u: Tensor) -> Iterator[slice]:
    """Return the rows of u [M, D] that are computed at a time, in order. There is one block at least."""
    M, D = u.shape
    rows = max(1, _BLOCK.get(u.device.type, 1 << 22) // D)
    return (slice(m, m + rows) for m in range(0, max(M, 1), rows))
