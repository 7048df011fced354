"""`lora_linear_multi`: one base, many adapters, and each row of x with its own adapter or none.

    y_m = W x_m + bias + s_i · B_i (A_i dropout_i(x_m)) + s_i · bias_i          i = the adapter of row m
    y_m = W x_m + bias                                                          for a row without an adapter

The base product is computed once for all rows. Each adapter is computed over its own rows, and every sum of it is made
in their order. So the low-rank half of a row, and the gradients of an adapter, do not depend on the other adapters in
the batch.

Chen et al., "Punica", 2023 (arXiv:2310.18547), and Sheng et al., "S-LoRA", 2023 (arXiv:2311.03285), serve many adapters
in this way; Ye et al., "mLoRA", 2023 (arXiv:2312.02515), train them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.backends import dispatch
from lora_kernels.core import operands
from lora_kernels.core.many import Adapter, AdapterStack
from lora_kernels.core.operands import Adapter as Adapter_
from lora_kernels.core.operands import Base, Needs
from lora_kernels.core.rows import Rows
from lora_kernels.ops import direct, prepare_multi, registered_multi
from lora_kernels.ops.autograd import (
    apply,
    as_dense,
    as_dtype,
    device_type,
    needs_plain_mode,
    no_autocast,
    no_graph,
    refuse_double_backward,
)
from lora_kernels.ops.registered import whole_weight
from lora_kernels.ops.sums import column_sum
from lora_kernels.ops.watched import watched
from lora_kernels.quant.weight import QuantizedWeight


def lora_linear_multi(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    adapters: Sequence[Adapter | None] | AdapterStack,
    rows: Rows,
    *,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return y = x Wᵀ + bias, plus s_i · (dropout_i(x) A_iᵀ) B_iᵀ in the rows of each adapter i, with gradients for x,
    every A_i, B_i and their biases, and bias. W is frozen.

    Args:
        x: [..., K], as in `lora_linear`; its leading dimensions are flattened into rows.
        weight: W [N, K] or a `QuantizedWeight`, as in `lora_linear`.
        adapters: `Adapter` s with ranks, scales, dropout rates and seeds of their own, in one dtype; None for one that
            has nothing in this layer. Or an `AdapterStack`, for serving: it needs no gradients, and its adapters
            were checked and laid out when it was made.
        rows: which rows belong to which adapter: see `Rows`. Rows of samples are repeated for the rows of each sample.
        bias: [N], in x's dtype.
        backend: the name of a back-end, which then serves the call or raises; None for the automatic choice.

    The mask of adapter i is a function of (seed_i, place of the row among the rows of i, column). An adapter without
    rows gets no gradient: None, and not zeros, with which an optimiser would move it. Compiled programs, which do not
    know the rows, give zeros.

    Returns:
        y [..., N], in x's dtype, contiguous. Rows without an adapter are bit-equal to the frozen layer's.

    Raises:
        TypeError, ValueError: what `lora_linear` raises for any of the adapters; adapters of several dtypes; rows of
            another number than x has, or of adapters that were not given.
        RuntimeError: from autograd, on double backward.
    """
    x, base, own, rows, biases = prepare_multi.prepare(x, weight, adapters, rows, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = _apply(flat, base, own, rows, backend)
    if biases:
        y = _add_biases(y, biases, rows)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def explain_multi(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    adapters: Sequence[Adapter | None] | AdapterStack,
    rows: Rows,
    *,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> dispatch.Explanation:
    """Return which back-end `lora_linear_multi` would run for these operands, and every reason why the others would not
    be chosen. The arguments are those of `lora_linear_multi`, and the same errors are raised. Nothing is computed."""
    x, base, own, rows, _ = prepare_multi.prepare(x, weight, adapters, rows, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    known = own if any(each is not None for each in own) else [prepare_multi.nothing(x, base.w)]
    return dispatch.explain(operands.call_of_multi("forward_multi", flat, base, known), backend)


def _apply(x: Tensor, base: Base, adapters: Sequence[Adapter_ | None], rows: Rows, backend: str | None) -> Tensor:
    """Return y without the adapters' biases. x is [M, K]."""
    w, bias = base
    if all(each is None for each in adapters):
        adapters, rows = [prepare_multi.nothing(x, w)], rows.padded(max(rows.n, 1))
        adapters = [*adapters, *[None] * (rows.n - 1)]
    counts = rows.known_counts
    if isinstance(w, Tensor) and counts is not None and not any(counts):
        if backend is not None:
            dispatch.pick(operands.call_of_multi("forward_multi", x, base, adapters), backend)
        return F.linear(x, w.to(x.dtype), bias)
    with no_autocast(device_type(x)):
        if not _recorded(x, bias, adapters):
            y, _ = _forward(x, base, adapters, rows, backend, False)
            return y
        (codes, *scales), w_format, blocksize = (
            (w.tensors, w.format, w.blocksize) if isinstance(w, QuantizedWeight) else ((w,), "dense", 0)
        )
        columns = [[None if each is None else each[field] for each in adapters] for field in range(5)]
        a, b, scale, p, seed = columns
        how = tuple(scale), tuple(p), counts, backend, w_format, blocksize
        tensors = (*a, *b, *seed, *scales)
        y = apply(LoRALinearMultiFunction, x, codes, bias, rows.order, rows.starts, how, *tensors)
    return y


def _recorded(x: Tensor, bias: Tensor | None, adapters: Sequence[Adapter_ | None]) -> bool:
    """Return whether a call needs its autograd Function, to compute a gradient."""
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad or (bias is not None and bias.requires_grad):
        return True
    if isinstance(adapters, AdapterStack):
        return False
    return any(each is not None and (each.a.requires_grad or each.b.requires_grad) for each in adapters)


def _add_biases(y: Tensor, biases: dict[int, Tensor], rows: Rows) -> Tensor:
    """Return y with s · bias of each adapter added to its rows. An adapter without rows gets no gradient."""
    counts = rows.known_counts
    used = [i for i in biases if counts is None or counts[i]]
    if not used:
        return y
    table = torch.stack([torch.zeros_like(biases[used[0]]), *(biases[i] for i in used)])
    place = torch.zeros(rows.n + 1, dtype=torch.int64, device=y.device)
    place[torch.tensor(used, device=y.device)] = torch.arange(1, len(used) + 1, device=y.device)
    sorted_ids = torch.searchsorted(rows.starts, torch.arange(rows.M, device=y.device, dtype=torch.int32), right=True)
    ids = torch.empty_like(sorted_ids).scatter_(0, rows.order.long(), sorted_ids - 1)
    return y + table.to(y.dtype)[place[ids]]


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
        how: tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...] | None, str | None, str, int],
        *tensors: Tensor | None,
    ) -> Tensor:
        """Return y.

        `how` is (scales, ps, counts, backend, w_format, w_blocksize). `tensors` are every a, then every b, every seed,
        and the other tensors of a quantised weight.
        """
        scale, p, counts, backend, w_format, blocksize = how
        n = len(scale)
        need_db = any(ctx.needs_input_grad[6 + n : 6 + 2 * n])
        need_da = any(ctx.needs_input_grad[6 : 6 + n])
        weight = whole_weight(w, tensors[3 * n :], w_format, blocksize, x.dtype)  # type: ignore[arg-type]
        adapters, rows = _adapters(n, tensors, scale, p), Rows(order, starts, counts)
        y, h = _forward(x, Base(weight, bias), adapters, rows, backend, need_db)
        ctx.save_for_backward(x if need_da else None, w, h if need_db else None, order, starts, *tensors)
        ctx.how, ctx.dtype = how, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, every da and db, and dbias; None for each that is not needed, or whose adapter has no rows."""
        saved = ctx.saved_tensors  # activation checkpointing lets a backward read this only once
        if not needs_plain_mode(dy):
            return _gradients(ctx, dy, *saved)
        with no_graph(), no_autocast(device_type(dy)):
            grads = _gradients(ctx, dy, *saved)
        return refuse_double_backward("lora_linear_multi", grads, dy, *saved)


def _adapters(
    n: int, tensors: Sequence[Tensor | None], scale: Sequence[float], p: Sequence[float]
) -> list[Adapter_ | None]:
    """Return the adapters that the arguments of the Function stand for."""
    return [
        None if tensors[i] is None else Adapter_(tensors[i], tensors[n + i], scale[i], p[i], tensors[2 * n + i])  # type: ignore[arg-type]
        for i in range(n)
    ]


def _forward(
    x: Tensor, base: Base, adapters: Sequence[Adapter_ | None], rows: Rows, backend: str | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (y, h), through the registered operator where something observes the call."""
    w, bias = base
    codes = w.codes if isinstance(w, QuantizedWeight) else as_dtype(w, x.dtype)
    way = registered_multi if _watched(x, codes, adapters, bias) else direct
    base = base if isinstance(w, QuantizedWeight) else Base(codes, bias)
    return way.forward_multi(x, base, adapters, rows, backend, save_h)


def _watched(x: Tensor, w: Tensor, adapters: Sequence[Adapter_ | None], other: Tensor | None) -> bool:
    """Return whether something observes a call, as `watched` finds out for each adapter."""
    if isinstance(adapters, AdapterStack):  # plain tensors that `stored` has made
        return watched(x, w, x, x, other)
    return any(each is not None and watched(x, w, each.a, each.b, other) for each in adapters)


def _gradients(  # type: ignore[no-untyped-def]
    ctx: Any, dy: Tensor, x, w, h, order, starts, *tensors
) -> tuple[Tensor | None, ...]:
    """Return dx, dbias, every da and db, in the places of the Function's arguments."""
    scale, p, counts, backend, w_format, blocksize = ctx.how
    n, needs_grad = len(scale), ctx.needs_input_grad
    need_dx, need_dbias = needs_grad[0], needs_grad[2]
    need_da, need_db = needs_grad[6 : 6 + n], needs_grad[6 + n : 6 + 2 * n]
    dy = as_dense(dy, ctx.dtype)
    dx, das, dbs = None, [None] * n, [None] * n
    if need_dx or any(need_da) or any(need_db):
        base = Base(whole_weight(w, tensors[3 * n :], w_format, blocksize, ctx.dtype))
        adapters, rows = _adapters(n, tensors, scale, p), Rows(order, starts, counts)
        way = registered_multi if _watched(dy, w, adapters, x) else direct
        needs = Needs(need_dx, need_da, need_db)
        dx, das, dbs = way.backward_multi(dy, x, base, adapters, rows, h, needs, backend)
    without = [counts is not None and not count for count in counts or [1] * n]
    return (
        dx if need_dx else None,
        None,
        column_sum(dy) if need_dbias else None,
        None,
        None,
        None,
        *(None if not need or none else da for da, need, none in zip(das, need_da, without, strict=True)),
        *(None if not need or none else db for db, need, none in zip(dbs, need_db, without, strict=True)),
        *[None] * (len(tensors) - 2 * n),
    )
