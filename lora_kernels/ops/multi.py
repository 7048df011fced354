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
from dataclasses import replace
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
from lora_kernels.ops import direct, plain_multi, prepare_multi, registered_multi
from lora_kernels.ops.autograd import (
    apply,
    as_dense,
    as_dtype,
    device_type,
    needs_plain_mode,
    no_autocast,
    no_graph,
    outlived,
    refuse_double_backward,
)
from lora_kernels.ops.registered import whole_weight
from lora_kernels.ops.sums import column_sum
from lora_kernels.ops.watched import PLAIN, watched
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
    if plain_multi.serves(x, weight, adapters, rows, bias, backend):
        return plain_multi.lora_linear_multi(x, weight, adapters, rows, bias)
    x, base, own, rows, biases, asking = prepare_multi.prepare(x, weight, adapters, rows, bias)
    if asking:
        prepare_multi.draw(own, asking, x.device)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = _apply(flat, base, own, rows, biases, backend)
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
    x, base, own, rows, *_ = prepare_multi.prepare(x, weight, adapters, rows, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    known = [each for each in own if each is not None]
    call = operands.call_of_multi("forward_multi", flat, base, known or [prepare_multi.nothing(x, base.w)])
    counts = rows.counts
    told = f"{len(known)} adapters of ranks {', '.join(str(each.a.shape[0]) for each in known)}; " if known else ""
    told += f"rows of each: {', '.join(map(str, counts))}; " if counts else ""
    return replace(dispatch.explain(call, backend), rows=f"{told}{rows.M - sum(counts)} rows without an adapter")


def _apply(
    x: Tensor,
    base: Base,
    adapters: Sequence[Adapter_ | None],
    rows: Rows,
    biases: prepare_multi.Biases,
    backend: str | None,
) -> Tensor:
    """Return y. x is [M, K]."""
    w, bias = base
    counts = rows.known_counts
    if counts is not None:
        used = rows.used
        if biases:
            biases = {i: biases[i] for i in used if i in biases}
        for i in used:
            if adapters[i] is not None:
                break
        else:
            adapters = ()  # no row has an adapter in this layer
    elif not any(each is not None for each in adapters):
        adapters = ()
    if not adapters:
        if backend is None and isinstance(w, Tensor):
            with no_autocast(device_type(x)):
                return F.linear(x, as_dtype(w, x.dtype), bias)
        adapters, rows = [prepare_multi.nothing(x, w)], Rows(rows.order, rows.starts[-1:].new_zeros(2), (0,))
    with no_autocast(device_type(x)):
        if not _recorded(x, bias, adapters, biases):
            y, _ = _forward(x, base, adapters, rows, backend, False)
            return _add_biases(y, biases, rows)
        scales: tuple[Tensor, ...] = ()
        codes, w_format, blocksize = w, "dense", 0
        if isinstance(w, QuantizedWeight):
            (codes, *scales), w_format, blocksize = w.tensors, w.format, w.blocksize  # type: ignore[assignment]
        a, b, scale, p, seed = zip(*[_NOTHING if each is None else each for each in adapters], strict=True)
        # A compiler takes the rows as tensors, so that the program it makes serves any rows.
        kept = None if torch.compiler.is_compiling() else rows
        how = scale, p, kept, backend, w_format, blocksize, tuple(biases)
        tensors = *a, *b, *seed, *biases.values(), *scales
        y = apply(LoRALinearMultiFunction, x, codes, bias, rows.order, rows.starts, how, *tensors)
    return y


_NOTHING = (None, None, 1.0, 0.0, None)
"""The fields of an adapter that has nothing in a layer."""

_FIRST = 6
"""The number of arguments of the autograd Function before its `tensors`."""


def _recorded(
    x: Tensor, bias: Tensor | None, adapters: Sequence[Adapter_ | None], biases: prepare_multi.Biases
) -> bool:
    """Return whether a call needs its autograd Function: to compute a gradient, or for a tensor that has outlived a
    transform of torch.func."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return True
    listed = not isinstance(adapters, AdapterStack)  # a stack holds plain tensors that `stored` has made
    if torch.is_grad_enabled() and listed:
        for each in adapters:
            if each is not None and (each[0].requires_grad or each[1].requires_grad):
                return True
        if any(each.requires_grad for each in biases.values()):
            return True
    if torch.compiler.is_compiling():
        return False
    tensors = [t for each in adapters if each is not None for t in each[:2]] if listed else ()
    return outlived(x, bias, *tensors, *biases.values())


def _add_biases(y: Tensor, biases: prepare_multi.Biases, rows: Rows) -> Tensor:
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
        y, h = _forward(x, Base(weight, bias), _adapters(n, tensors, scale, p), rows, backend, need_db)
        y = _add_biases(y, dict(zip(biased, tensors[3 * n : last], strict=True)), rows)  # type: ignore[arg-type]
        if kept is not None:
            order = starts = None  # type: ignore[assignment]
        ctx.dtypes = [t.dtype for t in tensors[3 * n : last] if t is not None]
        rest = *tensors[: 3 * n], *tensors[last:]
        ctx.save_for_backward(x if need_da else None, w, h if need_db else None, order, starts, *rest)
        ctx.how, ctx.dtype = how, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, every da, db and dbias; None for each that is not needed, or whose adapter has no rows."""
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
