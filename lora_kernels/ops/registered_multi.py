"""The registered operators of many adapters in one call, and the functions that call them: the same two as in `direct`.

See `registered`, whose library these operators join. Their arguments are the fields of the adapters as lists, in which
an adapter that has nothing in the layer is None, and the two tensors of `Rows`. So a compiler neither specialises a
program on the rows nor compiles again when they change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.core.operands import Adapter, Base, Gradients, MultiResult, Needs
from lora_kernels.core.rows import Rows
from lora_kernels.ops import check, direct, flops
from lora_kernels.ops.registered import library
from lora_kernels.ops.weights import weight_parts, whole_weight
from lora_kernels.quant.weight import shape_of

_ADAPTERS = "Tensor?[] a, Tensor?[] b, float[] scale, float[] p, Tensor?[] seed, Tensor order, Tensor starts, "
_QUANTISED = 'Tensor[]? w_scales=None, str w_format="dense", int w_blocksize=0'

library.define(
    f"forward_multi(Tensor x, Tensor w, Tensor? bias, {_ADAPTERS}str? backend, bool save_h, {_QUANTISED}) "
    "-> (Tensor y, Tensor h)"
)
library.define(
    f"backward_multi(Tensor dy, Tensor? x, Tensor w, Tensor? h, {_ADAPTERS}str? backend, "
    f"bool need_dx, bool[] need_da, bool[] need_db, {_QUANTISED}) -> Tensor[]"
)


def forward_multi(
    x: Tensor, base: Base, adapters: Sequence[Adapter | None], rows: Rows, backend: str | None, save_h: bool
) -> MultiResult:
    """Return (y [M, N], h [M · the largest rank]) of one layer with many adapters; h has no elements unless
    `save_h`."""
    flops.register()
    w, *last = weight_parts(base.w)
    return _forward_op(x, w, base.bias, *_lists(adapters), rows.order, rows.starts, backend, save_h, *last)


def backward_multi(
    dy: Tensor, x: Tensor | None, base: Base, adapters: Sequence[Adapter | None], rows: Rows, h: Tensor | None,
    needs: Needs, backend: str | None,
) -> Gradients:  # fmt: skip
    """Return (dx, das, dbs) of one layer with many adapters; a gradient that `needs` does not ask for has no
    elements."""
    flops.register()
    w, *last = weight_parts(base.w)
    need_da, need_db = list(needs.da), list(needs.db)
    dx, *rest = _backward_op(
        dy, x, w, h, *_lists(adapters), rows.order, rows.starts, backend, needs.dx, need_da, need_db, *last
    )
    return dx, rest[: len(adapters)], rest[len(adapters) :]


def _lists(adapters: Sequence[Adapter | None]) -> list[list[Any]]:
    """Return one list for each field of the adapters."""
    fields = [(None, None, 1.0, 0.0, None) if each is None else tuple(each) for each in adapters]
    return [list(column) for column in zip(*fields, strict=True)]


def _adapters(a, b, scale, p, seed) -> list[Adapter | None]:  # type: ignore[no-untyped-def]
    """Return the adapters that such lists stand for. torch's dispatcher negates the tensors of a ``Tensor[]`` that are
    lazily negated, but not those of a ``Tensor?[]``."""
    fields = zip(a, b, scale, p, seed, strict=True)
    return [
        None if own_a is None else Adapter(own_a.resolve_neg(), own_b.resolve_neg(), *rest)
        for own_a, own_b, *rest in fields
    ]


def _size_of_h(M: int, a: list[Tensor | None]) -> tuple[int, Tensor | None]:
    """Return the elements of a buffer for h that is large enough for any rows, and a tensor of its dtype."""
    ranks = [each.shape[0] for each in a if each is not None]
    return M * max(ranks, default=0), next((each for each in a if each is not None), None)


# --- what the operators run, and the shapes of their results for a compiler; the schemas above state the types ---


def _run_forward(  # type: ignore[no-untyped-def]
    x, w, bias, a, b, scale, p, seed, order, starts, backend, save_h, w_scales=None, w_format="dense", w_blocksize=0
):
    for own_a, own_b in zip(a, b, strict=True):
        if own_a is not None:
            check.operator(x, w if w_format == "dense" else x, own_a, own_b, bias)
    base = Base(whole_weight(w, w_scales, w_format, w_blocksize, x.dtype), bias)
    y, h = direct.forward_multi(x, base, _adapters(a, b, scale, p, seed), Rows(order, starts), backend, save_h)
    size, like = _size_of_h(x.shape[0], a)
    if h is None or like is None:
        return y, x.new_empty(0)
    whole = like.new_zeros(size)
    whole[: h.numel()] = h
    return y, whole


def _fake_forward(  # type: ignore
    x, w, bias, a, b, scale, p, seed, order, starts, backend, save_h, w_scales=None, w_format="dense", w_blocksize=0
):
    size, like = _size_of_h(x.shape[0], a)
    N = w.shape[0] if w_format == "dense" else shape_of(w, w_format)[0]
    return x.new_empty(x.shape[0], N), x.new_empty(0) if like is None or not save_h else like.new_empty(size)


def _run_backward(  # type: ignore[no-untyped-def]
    dy, x, w, h, a, b, scale, p, seed, order, starts, backend, need_dx, need_da, need_db,
    w_scales=None, w_format="dense", w_blocksize=0,
):  # fmt: skip
    for own_a, own_b in zip(a, b, strict=True):
        if own_a is not None:
            check.operator(dy, w if w_format == "dense" else dy, own_a, own_b, None)
    base = Base(whole_weight(w, w_scales, w_format, w_blocksize, dy.dtype))
    needs = Needs(need_dx, tuple(need_da), tuple(need_db))
    rows = Rows(order, starts)
    dx, das, dbs = direct.backward_multi(dy, x, base, _adapters(a, b, scale, p, seed), rows, h, needs, backend)
    return [
        dy.new_empty(0) if dx is None else dx,
        *(_gradient(own, like, need, dy) for own, like, need in zip(das, a, need_da, strict=True)),
        *(_gradient(own, like, need, dy) for own, like, need in zip(dbs, b, need_db, strict=True)),
    ]


def _gradient(grad: Tensor | None, like: Tensor | None, need: bool, dy: Tensor) -> Tensor:
    """Return a gradient as an operator can return it: zeros for an adapter without rows, and a tensor of no elements
    where it is not needed."""
    if like is None or not need:
        return dy.new_empty(0)
    return like.new_zeros(like.shape) if grad is None else grad


def _fake_backward(  # type: ignore
    dy, x, w, h, a, b, scale, p, seed, order, starts, backend, need_dx, need_da, need_db,
    w_scales=None, w_format="dense", w_blocksize=0,
):  # fmt: skip
    K = next((each.shape[1] for each in a if each is not None), 0)
    return [
        dy.new_empty(dy.shape[0], K) if need_dx else dy.new_empty(0),
        *(_gradient(None, like, need, dy) for like, need in zip(a, need_da, strict=True)),
        *(_gradient(None, like, need, dy) for like, need in zip(b, need_db, strict=True)),
    ]


for _name, _run, _fake in (
    ("forward_multi", _run_forward, _fake_forward),
    ("backward_multi", _run_backward, _fake_backward),
):
    library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=library)
_forward_op = torch.ops.lora_kernels.forward_multi.default
_backward_op = torch.ops.lora_kernels.backward_multi.default
