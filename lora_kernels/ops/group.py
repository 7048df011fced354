"""`lora_linear_group`: layers that read the same x, in one call: q, k and v, or gate and up.

    y_i = x W_iᵀ + bias_i + s_i · (dropout_i(x) A_iᵀ) B_iᵀ          dx = Σ_i dx_i

Each W_i is dense or a `QuantizedWeight`. The CPU kernels compute every h_i in one pass over x and accumulate dx in one
buffer. Back-ends whose kernels serve one layer at a time run them once for each layer. Each layer has a dropout mask of
its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.core.operands import Adapter, Base, Layer, Needs
from lora_kernels.ops import direct, plain, registered
from lora_kernels.ops.autograd import (
    apply,
    as_dense,
    device_type,
    keeps_hooks,
    needs_plain_mode,
    no_autocast,
    no_graph,
    refuse_double_backward,
)
from lora_kernels.ops.prepare import bias_beside, prepare
from lora_kernels.ops.sums import column_sum
from lora_kernels.ops.watched import watched
from lora_kernels.ops.weights import each_weight, each_weight_parts
from lora_kernels.quant.weight import QuantizedWeight

__all__ = ["Layer", "lora_linear_group"]

_FIELDS = 6
"""The number of the autograd Function's arguments that belong to one layer, beside w: bias, a, b, scale, p, seed."""


def lora_linear_group(x: Tensor, layers: Iterable[Layer], *, backend: str | None = None) -> tuple[Tensor, ...]:
    """Return the y_i [..., N_i] of layers that read the same x [..., K], as `lora_linear` gives them one by one.

    `layers` may be any iterable. N, the rank, scale, bias, dropout and seed are each layer's own; A and B have the same
    dtype in all. Seeds that are None are drawn in the order of the layers.

    Raises:
        TypeError, ValueError: what `lora_linear` raises for any of the layers; no layers; adapters of several dtypes.
        RuntimeError: from autograd, on double backward; for a named back-end in the transforms of torch.func that
            differentiate.
    """
    layers = tuple(layers)
    if not layers:
        raise ValueError("lora_linear_group needs at least one layer, got none")
    if not isinstance(layers[0], Layer):
        raise TypeError(
            f"layers must be an iterable of lora_kernels.group.Layer, got a {type(layers[0]).__name__} in it"
        )
    if len({layer.lora_a.dtype for layer in layers}) > 1:
        dtypes = ", ".join(str(layer.lora_a.dtype) for layer in layers)
        raise TypeError(f"adapters of one group must have one dtype, got {dtypes}: call lora_linear for each instead")
    ws: list[Any] = []
    parts: list[Any] = []
    plain_ys: list[Tensor] = []
    rows = x
    for layer in layers:
        if layer.bias is not None and isinstance(layer.weight, QuantizedWeight) and layer.bias.dtype != rows.dtype:
            layer = layer._replace(bias=bias_beside(rows, layer.bias))
        prepared = prepare("lora_linear_group", rows, layer, backend, quantised=True)
        if prepared is None:
            plain_ys.append(plain.lora_linear(x, layer))
        else:
            rows, (w, bias), adapter, _ = prepared
            ws.append(w)
            parts += [bias, *adapter]
    if plain_ys:
        return tuple(plain_ys)
    rows = rows if x.dim() == 2 else rows.reshape(-1, x.shape[-1])
    with no_autocast(device_type(x)):
        codes, scales, formats, blocksizes = each_weight_parts(ws)
        how = backend, formats, blocksizes, len(ws)
        ys = apply(LoRALinearGroupFunction, rows, how, *codes, *parts, *(scales or ()))
    return tuple(ys) if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


class LoRALinearGroupFunction(torch.autograd.Function):
    """The group's autograd Function. It saves what `lora_linear` would save of each layer, but x only once. A layer
    whose y is not used takes no time in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, how: tuple[str | None, list[str] | None, list[int] | None, int], *tensors: Any
    ) -> tuple[Tensor, ...]:
        """Return the y_i.

        `how` is (backend, formats, blocksizes, number of layers). `tensors` are the w of all layers, or the codes of
        those that are quantised; then the bias and the fields of the `Adapter` of the first layer, then the second's,
        ...; and at last the scales that belong to the codes, as `each_weight` takes them.
        """
        backend, formats, blocksizes, n = how
        end = n + n * _FIELDS
        w, parts, scales = tensors[:n], tensors[n:end], tensors[end:]
        needs = ctx.needs_input_grad[2 + n : 2 + end]
        need_dbias, need_da, need_db = (list(needs[field::_FIELDS]) for field in (0, 1, 2))
        bias, a, b, scale, p, seed = (list(parts[field::_FIELDS]) for field in range(_FIELDS))
        # Under autocast each w is converted here and again in the backward, so that no copy of it is saved.
        whole = each_weight(w, scales, formats, blocksizes, x.dtype)
        bases = [Base(each, own_bias) for each, own_bias in zip(whole, bias, strict=True)]
        adapters = [Adapter(*each) for each in zip(a, b, scale, p, seed, strict=True)]
        observed = any(watched(x, *each) for each in zip(w, a, b, bias, strict=True))
        way = registered if observed else direct
        ys, hs = way.forward_group(x, bases, adapters, backend, need_db)
        ctx.save_for_backward(x if any(need_da) else None, *w, *a, *b, *hs, *seed, *scales)
        ctx.scale, ctx.p, ctx.backend, ctx.formats, ctx.dtype = scale, p, backend, (formats, blocksizes), x.dtype
        ctx.need_da, ctx.need_db, ctx.need_dbias = need_da, need_db, need_dbias
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @keeps_hooks
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return one dx, and da, db and dbias of each layer; None for each that is not needed."""
        x, *saved = ctx.saved_tensors  # activation checkpointing lets a backward read this only once
        # _gradients is a function of its own: torch 2.14 cannot compile a loop within `with` under Python 3.13.
        if not needs_plain_mode(saved[0]):
            return _gradients(ctx, dys, x, saved)
        with no_graph(), no_autocast(device_type(saved[0])):
            grads = _gradients(ctx, dys, x, saved)
        return refuse_double_backward("lora_linear_group", grads, *dys, x, *saved)


def _gradients(ctx: Any, dys: Sequence[Tensor | None], x: Tensor | None, saved: list[Any]) -> tuple[Tensor | None, ...]:
    """Return dx, None for `how` and each w, and the gradients of every layer's fields; None for the scales."""
    count, need_dx = len(dys), ctx.needs_input_grad[0]
    w, a, b, h, seed = (saved[i * count : (i + 1) * count] for i in range(5))
    formats, blocksizes = ctx.formats
    whole = each_weight(w, saved[5 * count :], formats, blocksizes, ctx.dtype)
    grads: list[list[Tensor | None]] = [[None] * _FIELDS for _ in dys]
    dx = None
    cast = {i: as_dense(dy, ctx.dtype) for i, dy in enumerate(dys) if dy is not None}
    asked = [i for i in cast if need_dx or ctx.need_da[i] or ctx.need_db[i]]
    if asked:
        bases = [Base(whole[i]) for i in asked]
        adapters = [Adapter(a[i], b[i], ctx.scale[i], ctx.p[i], seed[i]) for i in asked]
        needs = Needs(need_dx, tuple(ctx.need_da[i] for i in asked), tuple(ctx.need_db[i] for i in asked))
        observed = any(watched(cast[i], w[i], a[i], b[i], x) for i in asked)
        way = registered if observed else direct
        dx, das, dbs = way.backward_group(
            [cast[i] for i in asked], x, bases, adapters, [h[i] for i in asked], needs, ctx.backend
        )
        for i, da, db in zip(asked, das, dbs, strict=True):
            grads[i][1] = da if ctx.need_da[i] else None
            grads[i][2] = db if ctx.need_db[i] else None
    for i, dy in cast.items():
        grads[i][0] = column_sum(dy) if ctx.need_dbias[i] else None
    of_layers = (dx if need_dx else None, None, *[None] * count, *(grad for row in grads for grad in row))
    return *of_layers, *[None] * (len(ctx.needs_input_grad) - len(of_layers))
