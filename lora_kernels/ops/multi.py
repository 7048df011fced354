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

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.backends import dispatch
from lora_kernels.core import operands
from lora_kernels.core.many import Adapter, AdapterStack
from lora_kernels.core.operands import Adapter as Adapter_
from lora_kernels.core.operands import Base
from lora_kernels.core.rows import Rows
from lora_kernels.ops import plain_multi, prepare_multi
from lora_kernels.ops.autograd import (
    apply,
    as_dtype,
    device_type,
    no_autocast,
    outlived,
)
from lora_kernels.ops.multi_function import LoRALinearMultiFunction, Unused, add_biases, forward
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
    given = adapters
    counts = rows.known_counts
    if adapters and counts is not None:
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
        if torch.is_grad_enabled() and not isinstance(given, AdapterStack):
            trained = [t for each in given if each is not None for t in each[:2] if t.requires_grad]
            if trained:  # so that a backward can run, and DistributedDataParallel hears of each of them
                return apply(Unused, _apply(x, base, (), rows, {}, backend), *trained)
        if backend is None and isinstance(w, Tensor):
            with no_autocast(device_type(x)):
                return F.linear(x, as_dtype(w, x.dtype), bias)
        adapters, rows = [prepare_multi.nothing(x, w)], Rows(rows.order, rows.starts[-1:].new_zeros(2), (0,))
    with no_autocast(device_type(x)):
        if not _recorded(x, bias, adapters, biases):
            y, _ = forward(x, base, adapters, rows, backend, False)
            return add_biases(y, biases, rows)
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
    if outlived(x, bias, *biases.values()):
        return True
    is_dead = torch._C._functorch.is_dead_tensor_wrapper  # type: ignore[attr-defined]
    for each in adapters if listed else ():  # noqa: SIM110 - any() would enter a frame for each adapter
        if each is not None and (is_dead(each[0]) or is_dead(each[1])):
            return True
    return False
