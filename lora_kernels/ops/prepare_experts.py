"""The first step of a call of experts: autocast, checks, scale and seed, as in `prepare`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.core.dropout import draw_seed
from lora_kernels.core.operands import Adapter, Base, Layer
from lora_kernels.core.rows import Rows
from lora_kernels.ops import check
from lora_kernels.ops.autograd import autocast_of

OUT_OF_ORDER = (
    "the rows of each expert must follow each other in x, in the order of the experts, and those without an expert "
    "must come last: pass x[rows.order] and rows.in_order()"
)


def prepare(x: Tensor, layer: Layer, rows: Rows) -> tuple[Tensor, Base, Adapter, Rows]:
    """Return the operands in the form that back-ends take. W keeps its own dtype under autocast: it is converted expert
    by expert, so that no copy of its size is made. Raises TypeError or ValueError for operands that do not fit
    together."""
    w, a, b, scale, bias, p, seed = layer
    dtype = autocast_of(x)
    any_w = dtype is not None and x.dtype in (torch.float32, *check.HALVES)
    if any_w:
        assert dtype is not None
        x = x.to(dtype)
        a, b = (t.to(dtype) if t.dtype in check.HALVES else t for t in (a, b))
        bias = bias.to(dtype) if bias is not None and bias.dtype in check.DTYPES else bias
    check_operands(x, Layer(w, a, b, scale, bias, p), any_w)
    rows = fitting(rows, x, w.shape[0])
    assert isinstance(w, Tensor)
    if w.requires_grad:
        w = check.frozen(w)
    scale, b = check.scale(scale, b)
    drawn = None
    if p > 0:
        drawn = draw_seed(x.device) if seed is None else check.seed(seed, x.device)
    return x, Base(w, bias), Adapter(a, b, scale, p, drawn), rows


def check_operands(x: Tensor, layer: Layer, any_w: bool) -> None:
    """Raise TypeError or ValueError where x and the stacks of a layer of experts do not fit together. `any_w` allows W
    another dtype than x's."""
    w, a, b, scale, bias, p, _ = layer
    if not isinstance(w, Tensor):
        raise TypeError(f"weight must be a tensor [E, N, K], got a {type(w).__name__}: no experts are quantised")
    given = {"x": x, "weight": w, "lora_a": a, "lora_b": b}
    if bias is not None:  # without `|` of two dicts, which torch 2.6 cannot trace
        given["bias"] = bias
    if x.dim() != 2 or w.dim() != 3 or a.dim() != 3 or b.dim() != 3 or (bias is not None and bias.dim() != 2):
        raise ValueError(
            "x must be [M, K], weight [E, N, K], lora_a [E, R, K], lora_b [E, N, R] and bias [E, N]; got "
            + _shapes(given)
        )
    if w.shape[0] == 0 or len({t.shape[0] for name, t in given.items() if name != "x"}) > 1:
        raise ValueError(
            f"weight, lora_a, lora_b and bias must have the same experts, one at least; got {_shapes(given)}"
        )
    # The sizes and dtypes of one expert are those of a layer.
    one = Layer(w[0].detach(), a[0], b[0], scale, None if bias is None else bias[0], p)
    try:
        check.operands(x, one, any_w)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, in each of {w.shape[0]} experts") from None


def fitting(rows: Rows, x: Tensor, experts: int) -> Rows:
    """Return `rows` for x beside so many experts. Raises TypeError or ValueError where they do not fit."""
    if not isinstance(rows, Rows):
        raise TypeError(f"rows must be a lora_kernels.Rows, got a {type(rows).__name__}: see Rows.by_id")
    if rows.n > experts:
        raise ValueError(f"rows names {rows.n} experts, and weight has {experts}")
    if rows.per_sample or x.shape[0] != rows.M:
        what = "samples" if rows.per_sample else "rows"
        raise ValueError(f"rows has {rows.M} {what}, and x {tuple(x.shape)} has {x.shape[0]} rows")
    if rows.order.device != x.device:
        rows = rows.to(x.device)
    if not _seen_later() and not _in_order(rows):
        raise ValueError(OUT_OF_ORDER)
    return rows if rows.n == experts else rows.padded(experts)


def _seen_later() -> bool:
    """Return whether the call goes through its registered operator, which looks at the order of the rows when it
    runs."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _in_order(rows: Rows) -> bool:
    """Return whether rows are in order. While a CUDA graph is captured, when no value can be read, those must be made
    by `Rows.in_order`."""
    if rows.order.is_cuda and torch.cuda.is_current_stream_capturing():
        return bool(rows.known_in_order)
    return rows.is_in_order


def require_order(order: Tensor) -> None:
    """Raise ValueError where `order` is not 0, 1, 2 and so on, whose values nobody has seen yet; on a GPU RuntimeError,
    later."""
    numbers = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    if not order.is_cpu:
        torch._assert_async((order == numbers).all(), OUT_OF_ORDER)  # type: ignore[attr-defined]
    elif not torch.equal(order, numbers):
        raise ValueError(OUT_OF_ORDER)


def _shapes(given: dict[str, Any]) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
