"""The first step of a call of many adapters: autocast, checks, scales and seeds, as in `prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.core import operands
from lora_kernels.core.dropout import draw_seed
from lora_kernels.core.many import Adapter, AdapterStack
from lora_kernels.core.operands import Base, Layer
from lora_kernels.core.rows import Rows
from lora_kernels.ops import check
from lora_kernels.ops.autograd import autocast_of
from lora_kernels.quant.weight import QuantizedWeight

Biases = dict[int, Tensor]
"""s_i · bias_i of the adapters that have a bias of their own, by number."""


class Prepared(NamedTuple):
    """The operands of a call, checked."""

    x: Tensor
    """[..., K], in autocast's dtype where autocast is on."""
    base: Base
    """W in its own dtype, and the bias."""
    adapters: Sequence[operands.Adapter | None]
    rows: Rows
    """The rows of the flattened x, beside as many adapters as there are."""
    biases: Biases


def prepare(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    adapters: Sequence[Adapter | None] | AdapterStack,
    rows: Rows,
    bias: Tensor | None,
) -> Prepared:
    """Return the operands in the form that back-ends take. Raises TypeError or ValueError for operands that do not fit
    together."""
    if isinstance(adapters, Adapter) or not isinstance(adapters, Sequence):
        raise TypeError(f"adapters must be a list of lora_kernels.Adapter or None, got a {type(adapters).__name__}")
    if not isinstance(rows, Rows):
        raise TypeError(f"rows must be a lora_kernels.Rows, got a {type(rows).__name__}: see Rows.by_id")
    dtype = autocast_of(x)
    autocast = dtype is not None and x.dtype in (torch.float32, *check.HALVES)
    if autocast:
        assert dtype is not None
        x = x.to(dtype)
        bias = bias.to(dtype) if bias is not None and bias.dtype in check.DTYPES else bias
    quantised = isinstance(weight, QuantizedWeight)
    if isinstance(weight, QuantizedWeight):
        if not weight.checked:
            weight.check()
        if bias is not None and bias.dtype != x.dtype and bias.dtype in check.DTYPES:
            bias = bias.to(x.dtype)
    any_w = autocast or quantised
    biases: Biases = {}
    if isinstance(adapters, AdapterStack):
        own: Sequence[operands.Adapter | None] = adapters
        _check_stack(x, weight, adapters, bias, any_w)
    else:
        own = _checked(x, weight, adapters, bias, any_w, dtype if autocast else None, biases)
    if weight.requires_grad:
        weight = check.frozen(weight)  # type: ignore[arg-type]  # a QuantizedWeight requires none
    return Prepared(x, Base(weight, bias), own, _fitting(rows, x, len(adapters)), biases)


def _checked(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    adapters: Sequence[Adapter | None],
    bias: Tensor | None,
    any_w: bool,
    autocast: torch.dtype | None,
    biases: Biases,
) -> list[operands.Adapter | None]:
    """Return the adapters as back-ends take them, and put s · bias of each into `biases`."""
    own: list[operands.Adapter | None] = []
    first: torch.dtype | None = None
    for i, adapter in enumerate(adapters):
        if adapter is None:
            own.append(None)
            continue
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapter {i} must be a lora_kernels.Adapter or None, got a {type(adapter).__name__}")
        a, b, scale, p, seed, own_bias = adapter
        if autocast is not None:
            a, b = (t.to(autocast) if t.dtype in check.HALVES else t for t in (a, b))
        check.operands(x, Layer(weight, a, b, scale, bias, p, seed), any_w)
        if first is None:
            first = a.dtype
        elif a.dtype != first:
            raise TypeError(f"adapters of one call must have one dtype, got {first} and, for adapter {i}, {a.dtype}")
        if own_bias is not None:
            if own_bias.shape != b.shape[:1]:
                raise ValueError(f"the bias of adapter {i} must have shape {tuple(b.shape[:1])}, got {own_bias.shape}")
            biases[i] = own_bias * scale
        scale, b = check.scale(scale, b)
        drawn = None
        if p > 0:
            drawn = draw_seed(x.device) if seed is None else check.seed(seed, x.device)
        own.append(operands.Adapter(a, b, scale, p, drawn))
    if first is None:
        check.operands(x, Layer(weight, *_nothing(x, weight), 1.0, bias), any_w)
    return own


def _check_stack(
    x: Tensor, weight: Tensor | QuantizedWeight, stack: AdapterStack, bias: Tensor | None, any_w: bool
) -> None:
    """Raise TypeError or ValueError where a stack does not fit x and W. Its adapters fit each other."""
    adapter = next((each for each in stack if each is not None), None)
    a, b = (adapter.a, adapter.b) if adapter is not None else _nothing(x, weight)
    check.operands(x, Layer(weight, a, b, 1.0, bias), any_w)


def _nothing(x: Tensor, weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return an A and a B that fit W and x, without values."""
    N, K = weight.shape
    return x.new_empty(1, K), x.new_empty(N, 1)


def nothing(x: Tensor, weight: Tensor | QuantizedWeight) -> operands.Adapter:
    """Return an adapter that fits W and x, for a call in which no adapter has rows."""
    return operands.Adapter(*_nothing(x, weight), 1.0)


def _fitting(rows: Rows, x: Tensor, n: int) -> Rows:
    """Return `rows` for the flattened x beside n adapters. Raises ValueError where they do not fit."""
    if rows.n > n:
        raise ValueError(f"rows names {rows.n} adapters, and {n} were given")
    M = x.numel() // x.shape[-1]
    if rows.per_sample:
        B = x.shape[0] if x.dim() > 1 else 1
        if rows.M != B or (B and M % B):
            raise ValueError(f"rows has {rows.M} samples, and x {tuple(x.shape)} has {B}")
        rows = rows.repeated(M // B if B else 0)
    if rows.M != M:
        raise ValueError(
            f"rows has {rows.M} rows, and x {tuple(x.shape)} has {M}. For one adapter per sample take Rows.by_sample, "
            "or rows.repeated(length)"
        )
    if rows.order.device != x.device:
        rows = rows.to(x.device)
    return rows.padded(n)
