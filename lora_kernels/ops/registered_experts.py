"""The registered operators of experts, and the functions that call them: the same two as in `direct`.

See `registered`, whose library these operators join. Rows are passed as the two tensors of `Rows`, so that a compiler
neither specialises a program on them nor compiles again when they change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.core.operands import Adapter, Base, ExpertGradients, MultiResult, Needs
from lora_kernels.core.rows import Rows
from lora_kernels.ops import check, direct, flops
from lora_kernels.ops.prepare_experts import require_order
from lora_kernels.ops.registered import library

_ROWS = "Tensor order, Tensor starts, str? backend, "

library.define(
    "forward_experts(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, float scale, float p, Tensor? seed, "
    f"{_ROWS}bool save_h) -> (Tensor y, Tensor h)"
)
library.define(
    "backward_experts(Tensor dy, Tensor? x, Tensor w, Tensor a, Tensor b, Tensor? h, float scale, float p, "
    f"Tensor? seed, {_ROWS}bool need_dx, bool need_da, bool need_db) -> (Tensor dx, Tensor da, Tensor db)"
)


def forward_experts(
    x: Tensor, base: Base, adapter: Adapter, rows: Rows, backend: str | None, save_h: bool
) -> MultiResult:
    """Return (y [M, N], h [M, R]) of a layer of experts; h has no elements unless `save_h`."""
    flops.register()
    (w, bias), (a, b, scale, p, seed) = base, adapter
    return _forward_op(x, w, a, b, bias, scale, p, seed, rows.order, rows.starts, backend, save_h)


def backward_experts(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, rows: Rows, h: Tensor | None, needs: Needs,
    backend: str | None,
) -> ExpertGradients:  # fmt: skip
    """Return (dx, da, db) of a layer of experts; a gradient that `needs` does not ask for has no elements."""
    flops.register()
    (a, b, scale, p, seed), (need_dx, (need_da,), (need_db,)) = adapter, needs
    order, starts = rows.order, rows.starts
    return _backward_op(dy, x, base.w, a, b, h, scale, p, seed, order, starts, backend, need_dx, need_da, need_db)


def _run_forward(x, w, a, b, bias, scale, p, seed, order, starts, backend, save_h):  # type: ignore[no-untyped-def]
    check.operator(x, x, a, b, bias)
    require_order(order)
    adapter = Adapter(a, b, scale, p, seed)
    y, h = direct.forward_experts(x, Base(w, bias), adapter, Rows(order, starts), backend, save_h)
    return y, a.new_empty(0) if h is None else h


def _fake_forward(x, w, a, b, bias, scale, p, seed, order, starts, backend, save_h):  # type: ignore
    M = x.shape[0]
    return x.new_empty(M, w.shape[1]), a.new_empty(M, a.shape[1]) if save_h else a.new_empty(0)


def _run_backward(  # type: ignore[no-untyped-def]
    dy, x, w, a, b, h, scale, p, seed, order, starts, backend, need_dx, need_da, need_db
):
    check.operator(dy, dy, a, b, None)
    require_order(order)
    adapter, needs = Adapter(a, b, scale, p, seed), Needs(need_dx, (need_da,), (need_db,))
    dx, da, db = direct.backward_experts(dy, x, Base(w), adapter, Rows(order, starts), h, needs, backend)
    none = dy.new_empty(0)
    return none if dx is None else dx, a.new_empty(0) if da is None else da, b.new_empty(0) if db is None else db


def _fake_backward(  # type: ignore
    dy, x, w, a, b, h, scale, p, seed, order, starts, backend, need_dx, need_da, need_db
):
    return (
        dy.new_empty(dy.shape[0], a.shape[2]) if need_dx else dy.new_empty(0),
        a.new_empty(a.shape) if need_da else a.new_empty(0),
        b.new_empty(b.shape) if need_db else b.new_empty(0),
    )


for _name, _run, _fake in (
    ("forward_experts", _run_forward, _fake_forward),
    ("backward_experts", _run_backward, _fake_backward),
):
    library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=library)
_forward_op = torch.ops.lora_kernels.forward_experts.default
_backward_op = torch.ops.lora_kernels.backward_experts.default
