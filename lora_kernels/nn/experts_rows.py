"""The way of the rows of x to their experts and back: each token is gathered once for each of its top-k experts, and
their results are weighted and summed.

    x_sorted[m] = x[tokens[m]]                     y_t = Σ_j weights[t, j] · z[inverse[t, j]]

Both ways, and both of their gradients, sum over j in its order, so results are the same from run to run. A sum is made
in fp32 at least, and rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.core.rows import Rows
from lora_kernels.ops import plain
from lora_kernels.ops.autograd import as_dtype, device_type, no_autocast


class Routing(NamedTuple):
    """Which rows belong to which expert. It is made once for each forward."""

    rows: Rows
    """The rows of E experts, in order. The rows of a token that has no expert come last."""
    tokens: Tensor
    """[T·k]: the token of each row."""
    inverse: Tensor
    """[T, k]: the row of each token and each of its experts."""


def route(ids: Tensor, experts: int) -> Routing:
    """Return the rows of tokens with the experts ids [T, k]. An id outside of 0..experts - 1 is no expert: expert
    parallelism gives such ids to rows of another process. Their results are zero."""
    T, k = ids.shape
    flat = ids.reshape(-1)
    rows = Rows.by_id(torch.where((flat >= 0) & (flat < experts), flat, -1), experts)
    order = rows.order.long()
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(T * k, device=ids.device))
    return Routing(rows.in_order(), order // max(k, 1), inverse.view(T, k))


def gather(x: Tensor, routing: Routing) -> Tensor:
    """Return the rows of x [T, H], sorted by expert: [T·k, H]."""
    if _is_plain():
        return x.index_select(0, routing.tokens)
    return _Gather.apply(x, routing.tokens, routing.inverse)  # type: ignore[no-any-return,no-untyped-call]


def combine(z: Tensor, weights: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """Return y [T, H] in `dtype` from the sorted rows z [T·k, H] and the weights [T, k] of each token's experts."""
    if _is_plain():
        rows = z.index_select(0, routing.inverse.view(-1)).view(*weights.shape, z.shape[1])
        return (rows * weights[..., None]).sum(1).to(dtype)
    return _Combine.apply(z, weights, routing.tokens, routing.inverse, dtype)  # type: ignore[no-any-return,no-untyped-call]


def _is_plain() -> bool:
    """Return whether a call is recorded, or differentiated by a transform of torch.func or forward-mode AD, which see
    into torch's own operators only."""
    if torch.compiler.is_compiling():
        return plain.is_exporting()
    return torch._C._is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _sum(z: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return Σ_j weights[t, j] · z[places[t, j]], in z's dtype, without a gradient."""
    return F.embedding_bag(places, z, mode="sum", per_sample_weights=weights)


class _Gather(torch.autograd.Function):
    """x_sorted. It saves the numbers of the rows only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _sum(dx, inverse), None, None


class _Combine(torch.autograd.Function):
    """y. It saves z where the weights need a gradient, and the weights where z needs one."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weights: Tensor, tokens: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
        need_dz, need_dw, *_ = ctx.needs_input_grad
        ctx.save_for_backward(z if need_dw else None, weights if need_dz else None, tokens, inverse)
        ctx.z_dtype, ctx.weights_dtype = z.dtype, weights.dtype
        ctx.wide = torch.promote_types(torch.promote_types(z.dtype, weights.dtype), torch.float32)
        if z.dtype == weights.dtype == dtype:
            return _sum(z, inverse, weights)
        rows = z.index_select(0, inverse.view(-1)).view(*inverse.shape, z.shape[1])
        with no_autocast(device_type(z)):
            y = torch.bmm(as_dtype(weights[:, None], ctx.wide), as_dtype(rows, ctx.wide))
        return as_dtype(y[:, 0], dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, weights, tokens, inverse = ctx.saved_tensors
        need_dz, need_dw, *_ = ctx.needs_input_grad
        dz = dw = None
        if need_dz:
            # The weight of each row, in the order of the rows.
            own = torch.empty_like(weights).view(-1).scatter_(0, inverse.view(-1), weights.reshape(-1))
            if dy.dtype == ctx.z_dtype == weights.dtype:
                dz = _sum(dy, tokens[:, None], own[:, None])
            else:
                dz = as_dtype(as_dtype(dy.index_select(0, tokens), ctx.wide) * own[:, None], ctx.z_dtype)
        if need_dw:
            rows = z.index_select(0, inverse.view(-1)).view(*inverse.shape, z.shape[1])
            with no_autocast(device_type(dy)):
                dw = torch.bmm(as_dtype(dy[:, None], ctx.wide), as_dtype(rows, ctx.wide).mT)
            dw = as_dtype(dw[:, 0], ctx.weights_dtype)
        return dz, dw, None, None, None
