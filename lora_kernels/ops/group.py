"""`lora_linear_group`: layers that read the same x, in one call: q, k and v, or gate and up.

    y_i = x W_iᵀ + bias_i + s_i · (dropout_i(x) A_iᵀ) B_iᵀ          dx = Σ_i dx_i

One pass over x gives every h_i; dx is accumulated in one buffer; each layer's dropout mask is its own. A back-end that
has no such call is called once for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Adapter, Base, Needs, call_of
from lora_kernels.ops import check
from lora_kernels.ops import linear as ops
from lora_kernels.ops.tracing import as_autocast_asks, no_autocast, no_graph, refuse_double_backward, refuse_transforms

_LAYERS = "Tensor[] w, Tensor[] a, Tensor[] b, "
_SETTINGS = "float[] scale, float[] p, Tensor?[] seed, str? backend, "

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(f"forward_group(Tensor x, {_LAYERS}Tensor?[] bias, {_SETTINGS}bool[] save_h) -> Tensor[]")
_library.define(
    f"backward_group(Tensor[] dy, Tensor? x, {_LAYERS}Tensor[] h, {_SETTINGS}"
    "bool need_dx, bool[] need_da, bool[] need_db) -> Tensor[]"
)


class Layer(NamedTuple):
    """What `lora_linear` takes besides x, of one layer."""

    weight: Tensor
    """W [N, K]."""
    lora_a: Tensor
    """A [R, K]."""
    lora_b: Tensor
    """B [N, R]."""
    scale: float | Tensor
    bias: Tensor | None = None
    """[N]."""
    dropout_p: float = 0.0
    seed: Tensor | int | None = None


def lora_linear_group(x: Tensor, layers: Sequence[Layer], *, backend: str | None = None) -> tuple[Tensor, ...]:
    """The y_i [..., N_i] of layers that read the same x [..., K], as `lora_linear` gives them one by one.

    N, the rank, scale, bias, dropout and seed are each layer's own; A and B have the same dtype in all. Seeds that are
    None are drawn in the order of the layers.

    Raises:
        TypeError, ValueError: what `lora_linear` raises for any of the layers; no layers; adapters of several dtypes.
        RuntimeError: from autograd, on double backward.
    """
    if not layers:
        raise ValueError("lora_linear_group needs at least one layer, got none")
    if len({layer.lora_a.dtype for layer in layers}) > 1:
        dtypes = ", ".join(str(layer.lora_a.dtype) for layer in layers)
        raise TypeError(f"adapters of one group must have one dtype, got {dtypes}: call lora_linear for each instead")
    parts: list[Any] = []
    rows = x
    for weight, a, b, scale, bias, p, seed in layers:
        autocast, rows, bias, a, b = as_autocast_asks(rows, bias, a, b)
        check.operands(rows, weight, a, b, bias, p, autocast)
        scale, b = check.scale(scale, b)
        parts += [weight, a, b, bias, scale, p, check.seed(seed, x.device) if p > 0 else None]
    refuse_transforms("lora_linear_group")
    rows = rows if x.dim() == 2 else rows.reshape(-1, x.shape[-1])
    with no_autocast(x.device.type):
        ys = LoRALinearGroupFunction.apply(rows, backend, *parts)
    return tuple(ys) if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


class LoRALinearGroupFunction(torch.autograd.Function):
    """Saves what `lora_linear` would save of each layer, and x once. A layer whose y nobody used costs nothing in the
    backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str | None, *parts: Any) -> tuple[Tensor, ...]:
        """The y_i, through the registered operator; `parts` are the fields of one `Branch` after another."""
        w, a, b, bias, scale, p, seed = (list(column) for column in _columns(parts))
        need_da, need_db, need_dbias = (list(column) for column in _columns(ctx.needs_input_grad[2:])[1:4])
        cast = [each.to(x.dtype) for each in w]  # under autocast; anew in the backward, so that no copy of it is saved
        out = _forward_group(x, cast, a, b, bias, scale, p, seed, backend, need_db)
        ctx.save_for_backward(x if any(need_da) else None, *w, *a, *b, *out[len(w) :], *seed)
        ctx.scale, ctx.p, ctx.backend, ctx.dtype = scale, p, backend, x.dtype
        ctx.need_da, ctx.need_db, ctx.need_dbias = need_da, need_db, need_dbias
        ctx.set_materialize_grads(False)
        return tuple(out[: len(w)])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """One dx; da, db and dbias of each layer: of these only what is asked."""
        x, *saved = ctx.saved_tensors
        # In a function of its own: torch 2.14 cannot compile a loop within `with` under Python 3.13.
        with no_graph(), no_autocast(saved[0].device.type):
            flat = _gradients(ctx, dys, x, saved)
        return refuse_double_backward("lora_linear_group", flat)


def _gradients(
    ctx: Any, dys: Sequence[Tensor | None], x: Tensor | None, saved: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """dx, nothing for the back-end, and the gradients of every branch's fields."""
    count, need_dx = len(dys), ctx.needs_input_grad[0]
    w, a, b, h, seed = (saved[i * count : (i + 1) * count] for i in range(5))
    grads: list[list[Tensor | None]] = [[None] * 7 for _ in dys]
    dx = None

    def of(column: Any) -> list[Any]:
        return [column[i] for i in asked]

    cast = {i: dy.to(ctx.dtype) for i, dy in enumerate(dys) if dy is not None}
    asked = [i for i in cast if need_dx or ctx.need_da[i] or ctx.need_db[i]]
    if asked:
        need_da, need_db = of(ctx.need_da), of(ctx.need_db)
        dx, *das_dbs = _backward_group(
            of(cast), x, [t.to(ctx.dtype) for t in of(w)], of(a), of(b), of(h), of(ctx.scale), of(ctx.p),
            of(seed), ctx.backend, need_dx, need_da, need_db,
        )  # fmt: skip
        for i, da, db in zip(asked, das_dbs[: len(asked)], das_dbs[len(asked) :], strict=True):
            grads[i][1] = da if ctx.need_da[i] else None
            grads[i][2] = db if ctx.need_db[i] else None
    for i, dy in cast.items():
        grads[i][3] = dy.sum(0) if ctx.need_dbias[i] else None
    return (dx if need_dx else None, None, *(grad for row in grads for grad in row))


def _columns(parts: Sequence[Any]) -> list[Sequence[Any]]:
    """The operands of layers that lie one after another: all w, all a, all b, bias, scale, p and seed."""
    return [parts[i::7] for i in range(7)]


def _halves(
    w: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    bias: list[Tensor | None],
    scale: list[float],
    p: list[float],
    seed: list[Tensor | None],
) -> tuple[list[Base], list[Adapter]]:
    bases = [Base(*each) for each in zip(w, bias, strict=True)]
    return bases, [Adapter(*each) for each in zip(a, b, scale, p, seed, strict=True)]


def _serving(op: str, rows: Tensor, bases: list[Base], adapters: list[Adapter], backend: str | None) -> list[Any]:
    """The back-end of each layer."""
    return [
        dispatch.pick(call_of(op, rows, base, adapter), backend) for base, adapter in zip(bases, adapters, strict=True)
    ]


def _run_forward(
    x: Tensor,
    w: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    bias: list[Tensor | None],
    scale: list[float],
    p: list[float],
    seed: list[Tensor | None],
    backend: str | None,
    save_h: list[bool],
) -> list[Tensor]:
    bases, adapters = _halves(w, a, b, bias, scale, p, seed)
    serving = _serving("forward", x, bases, adapters, backend)
    if len(set(serving)) == 1:
        ys, hs = serving[0].forward(x, bases, adapters, save_h)
    else:
        ys, hs = [], []
        for module, base, adapter, save in zip(serving, bases, adapters, save_h, strict=True):
            (y,), (h,) = module.forward(x, [base], [adapter], [save])
            ys.append(y)
            hs.append(h)
    return [*ys, *(ops.or_empty(h, x) for h in hs)]


def _run_backward(
    dy: list[Tensor],
    x: Tensor | None,
    w: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    h: list[Tensor],
    scale: list[float],
    p: list[float],
    seed: list[Tensor | None],
    backend: str | None,
    need_dx: bool,
    need_da: list[bool],
    need_db: list[bool],
) -> list[Tensor]:
    bases, adapters = _halves(w, a, b, [None] * len(w), scale, p, seed)
    hs = [each if need else None for each, need in zip(h, need_db, strict=True)]
    serving = _serving("backward", dy[0], bases, adapters, backend)
    if len(set(serving)) == 1:
        dx, das, dbs = serving[0].backward(dy, x, bases, adapters, hs, Needs(need_dx, tuple(need_da), tuple(need_db)))
    else:
        dx, das, dbs = None, [], []
        each = zip(serving, dy, bases, adapters, hs, need_da, need_db, strict=True)
        for module, d, base, adapter, hq, da, db in each:
            needs = Needs(need_dx, (da,), (db,))
            part, *rest = module.backward([d], x if da else None, [base], [adapter], [hq], needs)
            dx = part if dx is None else dx.add_(part)
            das += rest[0]
            dbs += rest[1]
    return [
        ops.or_empty(dx, dy[0]),
        *(ops.or_empty(da, q) for da, q in zip(das, a, strict=True)),
        *(ops.or_empty(db, q) for db, q in zip(dbs, b, strict=True)),
    ]


def _fake_forward(x, w, a, b, bias, scale, p, seed, backend, save_h):  # type: ignore
    ys = [x.new_empty(x.shape[0], each.shape[0]) for each in w]
    hs = [
        x.new_empty(x.shape[0], each.shape[0]) if save else x.new_empty(0) for each, save in zip(a, save_h, strict=True)
    ]
    return [*ys, *hs]


def _fake_backward(dy, x, w, a, b, h, scale, p, seed, backend, need_dx, need_da, need_db):  # type: ignore
    dx = dy[0].new_empty(dy[0].shape[0], w[0].shape[1]) if need_dx else dy[0].new_empty(0)
    das = [each.new_empty(each.shape if need else 0) for each, need in zip(a, need_da, strict=True)]
    dbs = [each.new_empty(each.shape if need else 0) for each, need in zip(b, need_db, strict=True)]
    return [dx, *das, *dbs]


for _name, _run, _fake in (
    ("forward_group", _run_forward, _fake_forward),
    ("backward_group", _run_backward, _fake_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=_library)
_forward_group = torch.ops.lora_kernels.forward_group.default
_backward_group = torch.ops.lora_kernels.backward_group.default
