"""The autograd Function of many adapters, and the two calls of a back-end that it makes.

forward    y, and Σ M_i R_i numbers of h        backward    dx, and da, db and the bias's gradient of each adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.core.many import AdapterStack
from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.core.rows import Rows
from lora_kernels.ops import direct, registered_multi
from lora_kernels.ops.autograd import (
    as_dense,
    as_dtype,
    device_type,
    keeps_hooks,
    needs_plain_mode,
    no_autocast,
    no_graph,
    refuse_double_backward,
)
from lora_kernels.ops.prepare_multi import Biases
from lora_kernels.ops.sums import column_sum
from lora_kernels.ops.watched import PLAIN, watched
from lora_kernels.ops.weights import whole_weight
from lora_kernels.quant.weight import QuantizedWeight

_FIRST = 6
"""The number of arguments of the autograd Function before its `tensors`."""


def add_biases(y: Tensor, biases: Biases, rows: Rows) -> Tensor:
    """Add s · bias of each adapter to its rows of y, which belongs to this call, and return y."""
    if not biases:
        return y
    if rows.known_counts is not None:
        for i, bias in biases.items():
            index = rows.index(i)
            y[index] += bias
        return y
    ids = rows.ids()
    for i, bias in biases.items():
        y = torch.where((ids == i)[:, None], (y + bias).to(y.dtype), y)
    return y


def _bias_gradients(dy: Tensor, numbers: tuple[int, ...], rows: Rows, dtypes: list[torch.dtype]) -> list[Tensor]:
    """Return Σ dy over the rows of each of these adapters: the gradients of s · bias."""
    if rows.known_counts is not None:
        return [column_sum(as_dtype(dy[rows.index(i)], dtype)) for i, dtype in zip(numbers, dtypes, strict=True)]
    ids, zero = rows.ids(), dy.new_zeros(())
    own = [torch.where((ids == i)[:, None], dy, zero) for i in numbers]
    return [column_sum(as_dtype(each, dtype)) for each, dtype in zip(own, dtypes, strict=True)]


class LoRALinearMultiFunction(torch.autograd.Function):
    """The autograd Function of many adapters. It saves x only if some A needs a gradient, Σ M_i R_i numbers of h only
    if some B does, the rows, the seeds, and references to w and every a and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        order: Tensor,
        starts: Tensor,
        how: tuple[tuple[float, ...], tuple[float, ...], Rows | None, str | None, str, int, tuple[int, ...]],
        *tensors: Tensor | None,
    ) -> Tensor:
        """Return y.

        `how` is (scales, ps, rows or None, backend, w_format, w_blocksize, the adapters with a bias). `tensors` are
        every a, then every b, every seed, every s · bias, and the other tensors of a quantised weight.
        """
        scale, p, kept, backend, w_format, blocksize, biased = how
        n, needs = len(scale), ctx.needs_input_grad
        need_da, need_db = any(needs[_FIRST : _FIRST + n]), any(needs[_FIRST + n : _FIRST + 2 * n])
        last = 3 * n + len(biased)
        rows = Rows(order, starts) if kept is None else kept
        weight = whole_weight(w, tensors[last:], w_format, blocksize, x.dtype)  # type: ignore[arg-type]
        y, h = forward(x, Base(weight, bias), _adapters(n, tensors, scale, p), rows, backend, need_db)
        y = add_biases(y, dict(zip(biased, tensors[3 * n : last], strict=True)), rows)  # type: ignore[arg-type]
        if kept is not None:
            order = starts = None  # type: ignore[assignment]
        ctx.dtypes = [t.dtype for t in tensors[3 * n : last] if t is not None]
        rest = *tensors[: 3 * n], *tensors[last:]
        ctx.save_for_backward(x if need_da else None, w, h if need_db else None, order, starts, *rest)
        ctx.how, ctx.dtype = how, x.dtype
        return y

    @staticmethod
    @keeps_hooks
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, every da, db and dbias; None for each that is not needed, or whose adapter has no rows."""
        saved = ctx.saved_tensors  # activation checkpointing lets a backward read this only once
        if not needs_plain_mode(dy):
            return _gradients(ctx, dy, *saved)
        with no_graph(), no_autocast(device_type(dy)):
            grads = _gradients(ctx, dy, *saved)
        return refuse_double_backward("lora_linear_multi", grads, dy, *saved)


class Unused(torch.autograd.Function):
    """y of a call in which no row has an adapter, with the trained adapters in its graph. They get no gradient: None,
    and not zeros."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *trained: Tensor) -> Tensor:
        """Return y."""
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dy, and None for every adapter."""
        return dy, *(None for _ in ctx.needs_input_grad[1:])


def _adapters(
    n: int, tensors: Sequence[Tensor | None], scale: Sequence[float], p: Sequence[float]
) -> list[Adapter | None]:
    """Return the adapters that the arguments of the Function stand for."""
    return [
        None if tensors[i] is None else Adapter(tensors[i], tensors[n + i], scale[i], p[i], tensors[2 * n + i])  # type: ignore[arg-type]
        for i in range(n)
    ]


def forward(
    x: Tensor, base: Base, adapters: Sequence[Adapter | None], rows: Rows, backend: str | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (y, h), through the registered operator where something observes the call."""
    w, bias = base
    codes = w.codes if isinstance(w, QuantizedWeight) else as_dtype(w, x.dtype)
    way = registered_multi if _watched(x, codes, adapters, bias) else direct
    base = base if isinstance(w, QuantizedWeight) else Base(codes, bias)
    return way.forward_multi(x, base, adapters, rows, backend, save_h)


def _watched(x: Tensor, w: Tensor, adapters: Sequence[Adapter | None], other: Tensor | None) -> bool:
    """Return whether something observes a call, as `watched` finds out for the operands of one adapter."""
    if watched(x, w, w, w, other):
        return True
    if isinstance(adapters, AdapterStack):  # plain tensors that `stored` has made
        return False
    for each in adapters:
        if each is not None:
            a, b = each[:2]
            if type(a) not in PLAIN or type(b) not in PLAIN or a.is_neg() or b.is_neg():
                return True
    return False


def _gradients(  # type: ignore[no-untyped-def]
    ctx: Any, dy: Tensor, x, w, h, order, starts, *tensors
) -> tuple[Tensor | None, ...]:
    """Return dx, dbias, every da, db and dbias_i, in the places of the Function's arguments."""
    scale, p, kept, backend, w_format, blocksize, biased = ctx.how
    n, needs_grad = len(scale), ctx.needs_input_grad
    need_dx, need_dbias = needs_grad[0], needs_grad[2]
    need_da, need_db = needs_grad[_FIRST : _FIRST + n], needs_grad[_FIRST + n : _FIRST + 2 * n]
    last = _FIRST + 3 * n
    need_own = [i for i, need in zip(biased, needs_grad[last : last + len(biased)], strict=True) if need]
    rows = Rows(order, starts) if kept is None else kept
    if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(dy):  # type: ignore[attr-defined]
        raise RuntimeError(
            "lora_linear_multi takes one dy at a time: call torch.autograd.grad for each without is_grads_batched (or "
            "vectorize), or take torch.func.vjp with torch.func.vmap"
        )
    dy = as_dense(dy, ctx.dtype)
    dx = None
    das: Sequence[Tensor | None] = [None] * n
    dbs: Sequence[Tensor | None] = das
    if need_dx or any(need_da) or any(need_db):
        base = Base(whole_weight(w, tensors[3 * n :], w_format, blocksize, ctx.dtype))
        adapters = _adapters(n, tensors, scale, p)
        way = registered_multi if _watched(dy, w, adapters, x) else direct
        dx, das, dbs = way.backward_multi(dy, x, base, adapters, rows, h, Needs(need_dx, need_da, need_db), backend)
        if rows.known_counts is not None:
            used = set(rows.used)
            need_da = [need and i in used for i, need in enumerate(need_da)]
            need_db = [need and i in used for i, need in enumerate(need_db)]
    own: dict[int, Tensor] = {}
    if need_own:
        dtypes = [dtype for i, dtype in zip(biased, ctx.dtypes, strict=True) if i in need_own]
        own = dict(zip(need_own, _bias_gradients(dy, tuple(need_own), rows, dtypes), strict=True))
    return (
        dx if need_dx else None,
        None,
        column_sum(dy) if need_dbias else None,
        None,
        None,
        None,
        *[da if need else None for da, need in zip(das, need_da, strict=True)],
        *[db if need else None for db, need in zip(dbs, need_db, strict=True)],
        *[None] * n,
        *[own.get(i) for i in biased],
        *[None] * (len(tensors) - 3 * n),
    )
