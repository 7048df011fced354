"""The eager back-end: GEMMs of torch called from Python, on any device and in any floating dtype.

    h = c·(keep ⊙ x) aᵀ          y = x wᵀ + bias, then y += s · h bᵀ in place
    g = s · dy b                 dx = dy w, then dx += c · keep ⊙ (g a) in place
    da = c · gᵀ(keep ⊙ x)        db = s · dyᵀ h

Without dropout there is no elementwise pass: ``addmm_`` adds the low-rank term to the result of the base GEMM. With
dropout, torch operations draw the mask, a few megabytes at a time. That is slow, and the reason for the other
back-ends.

Where the adapters are fp32 beside an x in 16 bits, the low-rank half is computed in fp32, as PEFT computes it: a, b, h
and g are not rounded. A few rows of x and dy are converted at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.backends.each import backward_each, forward_each
from lora_kernels.backends.eager_experts import backward_experts, forward_experts
from lora_kernels.backends.products import add_product, product, transposed_product
from lora_kernels.core import dropout
from lora_kernels.core.operands import Adapter, Base, Call, Gradients, MultiResult, Needs
from lora_kernels.core.rows import Rows
from lora_kernels.quant.weight import QuantizedWeight

__all__ = [
    "add_multi",
    "backward",
    "backward_experts",
    "backward_multi",
    "base_gemm",
    "forward",
    "forward_experts",
    "forward_multi",
    "keep_mask",
    "name",
    "why_not",
]

name = "eager"

_ELEMENTS = 1 << 22
"""The number of elements of a quantised w that are dequantised at a time."""


def why_not(call: Call) -> list[str]:
    """Return no reasons: this back-end serves every call."""
    return []


def _forward(x: Tensor, base: Base, adapter: Adapter, save_h: bool) -> tuple[Tensor, Tensor | None]:
    """Return (y, h) of one layer."""
    y = _base(x, base)
    return y, add_low_rank(y, x, adapter, save_h)


def add_low_rank(y: Tensor, x: Tensor, adapter: Adapter, save_h: bool) -> Tensor | None:
    """Add s · h bᵀ to y [M, N], which has x's dtype and contiguous rows, and return h; None unless `save_h`."""
    h = product(_masked(x, adapter), adapter.a.t(), dropout.rescale(adapter.p), adapter.a.dtype)
    add_product(y, h, adapter.b.t(), adapter.scale)
    return h if save_h else None


def _backward(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, h: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, da, db) of one layer."""
    return low_rank_backward(dy, x, adapter, h, needs, _base_backward(dy, base.w) if needs.dx else None)


def low_rank_backward(
    dy: Tensor, x: Tensor | None, adapter: Adapter, h: Tensor | None, needs: Needs, dx: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, da, db) of the low-rank half; None for each that is not needed. That of x is added to `dx`, if one is
    given."""
    a, b, scale, p, _ = adapter
    need_dx, (need_da,), (need_db,) = needs
    da = db = None
    if need_dx or need_da:
        g = product(dy, b, scale, b.dtype)
    if need_dx:
        if dx is None:
            dx = dy.new_zeros(dy.shape[0], a.shape[1])
        if p > 0:
            dx += _masked(product(g, a, dropout.rescale(p), dy.dtype), adapter)
        else:
            add_product(dx, g, a)
    if need_da:
        assert x is not None
        da = transposed_product(g, _masked(x, adapter), dropout.rescale(p), a.dtype)
    if need_db:
        assert h is not None
        db = transposed_product(dy, h, scale, b.dtype)
    return dx, da, db


forward = functools.partial(forward_each, _forward)
backward = functools.partial(backward_each, _backward)


def forward_multi(x: Tensor, base: Base, adapters: Sequence[Adapter | None], rows: Rows, save_h: bool) -> MultiResult:
    y = _base(x, base)
    if not save_h:
        add_multi(y, x, adapters, rows)
        return y, None
    parts = [h.reshape(-1) for h in _add_low_rank(y, x, adapters, rows)]
    return y, torch.cat(parts) if parts else x.new_empty(0)


def add_multi(y: Tensor, x: Tensor, adapters: Sequence[Adapter | None], rows: Rows) -> None:
    for _ in _add_low_rank(y, x, adapters, rows):
        pass


def _add_low_rank(y: Tensor, x: Tensor, adapters: Sequence[Adapter | None], rows: Rows) -> Iterator[Tensor]:
    """Add s · h bᵀ of each adapter to its rows of y, and yield its h after that."""
    for adapter, _, index in _with_rows(adapters, rows):
        h = product(_masked(_own(x, index), adapter), adapter.a.t(), dropout.rescale(adapter.p), adapter.a.dtype)
        own_y = _own(y, index)
        add_product(own_y, h, adapter.b.t(), adapter.scale)
        _put(y, index, own_y)
        yield h


def backward_multi(
    dy: Tensor,
    x: Tensor | None,
    base: Base,
    adapters: Sequence[Adapter | None],
    rows: Rows,
    h: Tensor | None,
    needs: Needs,
) -> Gradients:
    dx = _base_backward(dy, base.w) if needs.dx else None
    das: list[Tensor | None] = [None] * len(adapters)
    dbs: list[Tensor | None] = [None] * len(adapters)
    first = 0
    for adapter, i, index in _with_rows(adapters, rows):
        a, b, scale, p, _ = adapter
        size = rows.counts[i] * a.shape[0]
        if needs.dx or needs.da[i] or needs.db[i]:
            own_dy = _own(dy, index)
        if needs.dx or needs.da[i]:
            g = product(own_dy, b, scale, b.dtype)
        if dx is not None:
            own_dx = _own(dx, index)
            if p > 0:
                own_dx += _masked(product(g, a, dropout.rescale(p), dy.dtype), adapter)
            else:
                add_product(own_dx, g, a)
            _put(dx, index, own_dx)
        if needs.da[i]:
            assert x is not None
            das[i] = transposed_product(g, _masked(_own(x, index), adapter), dropout.rescale(p), a.dtype)
        if needs.db[i]:
            assert h is not None
            dbs[i] = transposed_product(own_dy, h[first : first + size].view(-1, a.shape[0]), scale, b.dtype)
        first += size
    return dx, das, dbs


def keep_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return dropout.keep_mask(seed, x.shape[0], x.shape[1], p).to(x.dtype)


def base_gemm(x: Tensor, w: Tensor | QuantizedWeight, bias: Tensor | None, transposed: bool = False) -> Tensor:
    return _base_backward(x, w) if transposed else _base(x, Base(w, bias))


def _with_rows(adapters: Sequence[Adapter | None], rows: Rows) -> Iterator[tuple[Adapter, int, slice | Tensor]]:
    """Yield the adapters that have rows, with their numbers and the index of their rows."""
    for i in rows.used:
        adapter = adapters[i]
        if adapter is not None:
            yield adapter, i, rows.index(i)


def _own(t: Tensor, index: slice | Tensor) -> Tensor:
    """Return the rows of an adapter: a view where they follow each other, else a copy."""
    return t.index_select(0, index) if isinstance(index, Tensor) else t[index]


def _put(t: Tensor, index: slice | Tensor, own: Tensor) -> None:
    """Put `own`, which `_own` gave and which was changed in place, back into t."""
    if isinstance(index, Tensor):
        t.index_copy_(0, index, own)


def _base(x: Tensor, base: Base) -> Tensor:
    """Return x Wᵀ + bias."""
    w, bias = base
    return F.linear(x, w, bias) if isinstance(w, Tensor) else _quantised(x, w, bias)


def _base_backward(dy: Tensor, w: Tensor | QuantizedWeight) -> Tensor:
    """Return dy W."""
    return dy @ w if isinstance(w, Tensor) else _quantised_transposed(dy, w)


def _blocks(w: QuantizedWeight) -> list[tuple[int, int]]:
    """Return the parts of w that are dequantised one after another, as (first row, row after the last)."""
    N, K = w.shape
    step = max(1, _ELEMENTS // K)
    return [(n, min(N, n + step)) for n in range(0, N, step)]


def _quantised(x: Tensor, w: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias, with a few rows of W dequantised at a time."""
    y = x.new_empty(x.shape[0], w.shape[0])
    for first, last in _blocks(w):
        y[:, first:last] = F.linear(x, w.rows(first, last, x.dtype), None if bias is None else bias[first:last])
    return y


def _quantised_transposed(dy: Tensor, w: QuantizedWeight) -> Tensor:
    """Return dy W. Where W is dequantised in several parts, their products are summed in fp32."""
    blocks = _blocks(w)
    if len(blocks) == 1:
        return dy @ w.rows(*blocks[0], dy.dtype)
    wide = torch.promote_types(dy.dtype, torch.float32)
    dx = torch.zeros(dy.shape[0], w.shape[1], dtype=wide, device=dy.device)
    for first, last in blocks:
        dx.addmm_(dy[:, first:last].to(wide), w.rows(first, last, wide))
    return dx.to(dy.dtype)


def _masked(x: Tensor, adapter: Adapter) -> Tensor:
    """Return keep ⊙ x with the adapter's mask; x itself where there is no dropout."""
    if adapter.p == 0:
        return x
    assert adapter.seed is not None
    return dropout.masked(x, adapter.p, adapter.seed)
