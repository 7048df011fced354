"""The first step of a call of many adapters: autocast, checks, scales and seeds, as in `prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.core import operands
from lora_kernels.core.dropout import draw_seeds
from lora_kernels.core.many import Adapter, AdapterStack
from lora_kernels.core.operands import Base, Layer
from lora_kernels.core.rows import Rows
from lora_kernels.ops import check
from lora_kernels.ops.autograd import autocast_of
from lora_kernels.quant.weight import QuantizedWeight

_INFINITY = float("inf")

Biases = dict[int, Tensor]
"""s_i · bias_i of the adapters that have a bias of their own, by number."""


class Prepared(NamedTuple):
    """The operands of a call, checked."""

    x: Tensor
    """[..., K], in autocast's dtype where autocast is on."""
    base: Base
    """W in its own dtype, and the bias."""
    adapters: Sequence[operands.Adapter | None]
    """As back-ends take them. An `AdapterStack` is a snapshot."""
    rows: Rows
    """The rows of the flattened x, beside as many adapters as there are."""
    biases: Biases
    asking: list[int]
    """The adapters with dropout whose seed is still to be drawn, after all checks: see `draw`."""


def check_kinds(adapters: Sequence[Adapter | None] | AdapterStack, rows: Rows) -> None:
    """Raise TypeError where `adapters` or `rows` are something else."""
    if isinstance(adapters, Adapter) or not isinstance(adapters, Sequence):
        raise TypeError(f"adapters must be a list of lora_kernels.Adapter or None, got a {type(adapters).__name__}")
    if not isinstance(rows, Rows):
        raise TypeError(f"rows must be a lora_kernels.Rows, got a {type(rows).__name__}: see Rows.by_id")


def prepare(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    adapters: Sequence[Adapter | None] | AdapterStack,
    rows: Rows,
    bias: Tensor | None,
) -> Prepared:
    """Return the operands in the form that back-ends take. Raises TypeError or ValueError for operands that do not fit
    together."""
    check_kinds(adapters, rows)
    dtype = autocast_of(x)
    autocast = dtype is not None and x.dtype in (torch.float32, *check.HALVES)
    if autocast:
        assert dtype is not None
        x = x.to(dtype)
        bias = bias.to(dtype) if bias is not None and bias.dtype in check.DTYPES else bias
    any_w = autocast
    if isinstance(weight, QuantizedWeight):
        any_w = True
        if not weight.checked:
            weight.check()
        if bias is not None and bias.dtype != x.dtype and bias.dtype in check.DTYPES:
            bias = bias.to(x.dtype)
    biases: Biases = {}
    asking: list[int] = []
    own: Sequence[operands.Adapter | None]
    if isinstance(adapters, AdapterStack):
        own = adapters if torch.compiler.is_compiling() else adapters.snapshot()
        check.operands(x, Layer(weight, *_largest(own, x, weight), 1.0, bias), any_w)
    else:
        own = _checked(x, weight, adapters, bias, any_w, dtype if autocast else None, biases, asking)
    if weight.requires_grad:
        weight = check.frozen(weight)  # type: ignore[arg-type]  # a QuantizedWeight requires none
    return Prepared(x, Base(weight, bias), own, fitting(rows, x, len(own)), biases, asking)


def _checked(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    adapters: Sequence[Adapter | None],
    bias: Tensor | None,
    any_w: bool,
    autocast: torch.dtype | None,
    biases: Biases,
    asking: list[int],
) -> list[operands.Adapter | None]:
    """Return the adapters as back-ends take them. Put s · bias of each into `biases`, and the numbers of those whose
    seed is still to be drawn into `asking`."""
    own: list[operands.Adapter | None] = [None] * len(adapters)
    first: Tensor | None = None
    (N, K), compiling = weight.shape, torch.compiler.is_compiling()
    for i, adapter in enumerate(adapters):
        if adapter is None:
            continue
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapter {i} must be a lora_kernels.Adapter or None, got a {type(adapter).__name__}")
        a, b, scale, p, seed, own_bias = adapter
        if autocast is not None:
            a, b = (t.to(autocast) if t.dtype in check.HALVES else t for t in (a, b))
        if first is None:  # this check is about x, W and the bias too
            check.operands(x, Layer(weight, a, b, scale, bias, p, seed), any_w)
            first, dtype, on_cpu = a, a.dtype, x.is_cpu
        else:
            a_shape = a.shape
            if not (
                a.dtype == dtype == b.dtype
                and ((a.is_cpu and b.is_cpu) if on_cpu else a.device == b.device == x.device)
                and len(a_shape) == 2
                and a_shape[1] == K
                and b.shape == (N, a_shape[0])
                and a_shape[0]
                and 0 <= p < 1
            ):
                _complain(i, first, x, Layer(weight, a, b, scale, bias, p, seed), any_w)
        if own_bias is not None:
            biases[i] = _own_bias(i, own_bias, b) * scale
        if compiling or type(scale) is not float or not -_INFINITY < scale < _INFINITY:
            scale, b = check.scale(scale, b)
        drawn = None
        if p > 0:
            if seed is None:
                asking.append(i)
            else:
                drawn = check.seed(seed, x.device)
        fields = a, b, scale, p, drawn
        # ``Adapter(...)`` would enter one more Python function for each adapter. Compilers may not know the other way.
        own[i] = operands.Adapter(*fields) if compiling else tuple.__new__(operands.Adapter, fields)
    if first is None:
        check.operands(x, Layer(weight, *_largest(own, x, weight), 1.0, bias), any_w)
    return own


def draw(own: Sequence[operands.Adapter | None], asking: list[int], device: torch.device) -> None:
    """Give new seeds to the adapters `asking` of the list `own`. They are drawn at once, in the order of the
    adapters."""
    assert isinstance(own, list)
    for i, seed in zip(asking, draw_seeds(len(asking), device), strict=True):
        a, b, scale, p, _ = own[i]
        own[i] = operands.Adapter(a, b, scale, p, seed)


def _complain(i: int, first: Tensor, x: Tensor, layer: Layer, any_w: bool) -> None:
    """Raise the error of adapter i, which does not fit x and W, or those before it."""
    try:
        check.operands(x, layer, any_w)
    except (TypeError, ValueError) as error:
        raise type(error)(f"adapter {i}: {error}") from None
    dtypes = f"{first.dtype} and, for adapter {i}, {layer.lora_a.dtype}"
    raise TypeError(
        f"adapters of one call must have one dtype, got {dtypes}: convert them, or call once for each dtype"
    )


def _own_bias(i: int, bias: Tensor, b: Tensor) -> Tensor:
    """Return the bias of adapter i. Raises TypeError or ValueError where it does not fit B."""
    if bias.dtype not in check.DTYPES:
        raise TypeError(f"the bias of adapter {i} must be fp64, fp32, fp16 or bf16, got {bias.dtype}")
    if bias.shape != b.shape[:1] or bias.device != b.device:
        raise ValueError(
            f"the bias of adapter {i} must have shape {tuple(b.shape[:1])} and lie on {b.device}, "
            f"got {tuple(bias.shape)} on {bias.device}"
        )
    return bias


def _largest(
    adapters: Sequence[operands.Adapter | None], x: Tensor, weight: Tensor | QuantizedWeight
) -> tuple[Tensor, Tensor]:
    """Return the A and B of the largest adapter of a stack. Where there is none, return such that fit W and x."""
    largest: operands.Adapter | None = getattr(adapters, "largest", None)
    return nothing(x, weight)[:2] if largest is None else largest[:2]


def nothing(x: Tensor, weight: Tensor | QuantizedWeight) -> operands.Adapter:
    """Return an adapter without values that fits W and x, for a call in which no adapter has rows."""
    N, K = weight.shape
    return operands.Adapter(x.new_empty(1, K), x.new_empty(N, 1), 1.0)


def fitting(rows: Rows, x: Tensor, n: int) -> Rows:
    """Return `rows` for the flattened x beside n adapters. Raises ValueError where they do not fit."""
    if rows.n > n:
        raise ValueError(f"rows names {rows.n} adapters, and {n} were given")
    shape = x.shape
    M = shape[0] if len(shape) == 2 else x.numel() // shape[-1]
    if rows.per_sample:
        B = shape[0] if len(shape) > 1 else 1
        if rows.M != B:
            raise ValueError(f"rows has {rows.M} samples, and x {tuple(shape)} has {B}")
        rows = rows.repeated(M // B if B else 0)
    if rows.M != M:
        raise ValueError(
            f"rows has {rows.M} rows, and x {tuple(shape)} has {M}. For one adapter per sample take Rows.by_sample, "
            "or rows.repeated(length)"
        )
    if rows.order.device != x.device:
        rows = rows.to(x.device)
    return rows if rows.n == n else rows.padded(n)
