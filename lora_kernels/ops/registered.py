"""The operators that are registered with torch, and the functions that call them: the same six as in `direct`.

torch.compile traces a call of ``torch.ops.lora_kernels.*`` without looking inside, and modes, profilers and
checkpointing policies see it. The operators have no derivatives: the autograd Functions of linear.py, group.py and
dora.py call them in their forward and backward.

The schema of an operator allows tensors, numbers, strings and lists of these, but no `Base` and no `Adapter`. So
`forward` takes a layer apart and calls the operator. The operator runs `_run_forward`, which puts the layer together
again and calls ``direct.forward``. The other operators do the same. A quantised weight is passed as its codes in place
of w, and its other parts in the last three arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.core.operands import Adapter, Base, Gradients, MaybeTensors, Needs, Results, Tensors
from lora_kernels.ops import check, direct, flops
from lora_kernels.ops.weights import each_weight, each_weight_parts, weight_parts, whole_weight
from lora_kernels.quant.weight import QuantizedWeight, shape_of

QUANTISED = 'Tensor[]? w_scales=None, str w_format="dense", int w_blocksize=0'
"""The last arguments of an operator with one weight. They say what w holds, if that is not a dense W."""
_QUANTISED_LAYERS = "Tensor[]? w_scales=None, str[]? w_format=None, int[]? w_blocksize=None"
"""The same for each layer of a group. The scales of all layers are one list, as `each_weight` reads it."""
_LAYERS = "Tensor[] w, Tensor[] a, Tensor[] b, "
_SETTINGS = "float[] scale, float[] p, Tensor?[] seed, str? backend, "

library = torch.library.Library("lora_kernels", "DEF")
library.define(
    "forward(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, float scale, float p, Tensor? seed, "
    f"str? backend, bool save_h, {QUANTISED}) -> (Tensor y, Tensor h)"
)
library.define(
    "backward(Tensor dy, Tensor? x, Tensor w, Tensor a, Tensor b, Tensor? h, float scale, float p, Tensor? seed, "
    f"str? backend, bool need_dx, bool need_da, bool need_db, {QUANTISED}) -> (Tensor dx, Tensor da, Tensor db)"
)
library.define("keep_mask(Tensor x, float p, Tensor seed, str? backend) -> Tensor")
library.define(
    "base_gemm(Tensor x, Tensor w, str? backend, Tensor? bias=None, ScalarType? adapter_dtype=None, "
    f"bool transposed=False, {QUANTISED}) -> Tensor"
)
library.define(
    f"forward_group(Tensor x, {_LAYERS}Tensor?[] bias, {_SETTINGS}bool[] save_h, {_QUANTISED_LAYERS}) -> Tensor[]"
)
library.define(
    f"backward_group(Tensor[] dy, Tensor? x, {_LAYERS}Tensor[] h, {_SETTINGS}"
    f"bool need_dx, bool[] need_da, bool[] need_db, {_QUANTISED_LAYERS}) -> Tensor[]"
)


# --- the functions of `direct`, through the operators ---


def forward(x: Tensor, base: Base, adapter: Adapter, backend: str | None, save_h: bool) -> tuple[Tensor, Tensor | None]:
    """Return (y [M, N], h [M, R]) of one layer; h has no elements unless `save_h`."""
    flops.register()
    (w, bias), (a, b, scale, p, seed) = base, adapter
    w, *last = weight_parts(w)
    return _forward_op(x, w, a, b, bias, scale, p, seed, backend, save_h, *last)


def backward(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, h: Tensor | None, needs: Needs, backend: str | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx [M, K], da [R, K], db [N, R]) of one layer; a gradient that `needs` does not ask for has no
    elements."""
    flops.register()
    (a, b, scale, p, seed), (need_dx, (need_da,), (need_db,)) = adapter, needs
    w, *last = weight_parts(base.w)
    return _backward_op(dy, x, w, a, b, h, scale, p, seed, backend, need_dx, need_da, need_db, *last)


def keep_mask(x: Tensor, p: float, seed: Tensor, backend: str | None) -> Tensor:
    """Return the dropout mask of x [M, K] as numbers 0 and 1 in x's dtype."""
    return _keep_mask_op(x, p, seed, backend)


def base_gemm(
    x: Tensor,
    w: Tensor | QuantizedWeight,
    backend: str | None,
    bias: Tensor | None = None,
    adapter_dtype: torch.dtype | None = None,
    transposed: bool = False,
) -> Tensor:
    """Return x Wᵀ + bias [M, N], or x W [M, K] where `transposed`."""
    flops.register()
    w, *last = weight_parts(w)
    return _base_gemm_op(x, w, backend, bias, adapter_dtype, transposed, *last)


def forward_group(
    x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], backend: str | None, save_h: Sequence[bool]
) -> Results:
    """Return (ys, hs) of layers that read the same x; an h has no elements unless its `save_h`."""
    flops.register()
    (w, bias), (a, b, scale, p, seed) = _columns(bases), _columns(adapters)
    w, *last = each_weight_parts(w)
    out = _forward_group_op(x, w, a, b, bias, scale, p, seed, backend, save_h, *last)
    return out[: len(w)], out[len(w) :]


def backward_group(
    dys: Tensors, x: Tensor | None, bases: Sequence[Base], adapters: Sequence[Adapter], hs: Tensors, needs: Needs,
    backend: str | None,
) -> Gradients:  # fmt: skip
    """Return (dx, das, dbs) of layers that read the same x; a gradient that `needs` does not ask for has no
    elements."""
    flops.register()
    (w, _), (a, b, scale, p, seed) = _columns(bases), _columns(adapters)
    need_da, need_db = list(needs.da), list(needs.db)
    w, *last = each_weight_parts(w)
    dx, *rest = _backward_group_op(dys, x, w, a, b, hs, scale, p, seed, backend, needs.dx, need_da, need_db, *last)
    return dx, rest[: len(w)], rest[len(w) :]


# --- layers taken apart, and put together again ---


def _columns(rows: Sequence[Base] | Sequence[Adapter]) -> list[Any]:
    """Return one list for each field, with its value in each of `rows`."""
    return [list(column) for column in zip(*rows, strict=True)]


def _layers(w, bias, a, b, scale, p, seed) -> tuple[list[Base], list[Adapter]]:  # type: ignore[no-untyped-def]
    """Return the bases and adapters that such lists stand for."""
    bases = [Base(*each) for each in zip(w, bias, strict=True)]
    return bases, [Adapter(*each) for each in zip(a, b, scale, p, seed, strict=True)]


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """Return `t`, or a tensor of no elements in place of None: an operator can return tensors only."""
    return like.new_empty(0) if t is None else t


def _each_or_empty(ts: MaybeTensors, likes: Iterable[Tensor]) -> list[Tensor]:
    return [_or_empty(t, like) for t, like in zip(ts, likes, strict=True)]


def _dense_or(rows: Tensor, w: Sequence[Tensor], w_format: Sequence[str] | None) -> list[Tensor]:
    """Return the dense tensors of `w`, with `rows` in place of codes."""
    formats = ["dense"] * len(w) if w_format is None else w_format
    return [each if format == "dense" else rows for each, format in zip(w, formats, strict=True)]


# --- what the operators run, and the shapes of their results for a compiler; the schemas above state the types ---


def _run_forward(  # type: ignore[no-untyped-def]
    x, w, a, b, bias, scale, p, seed, backend, save_h, w_scales=None, w_format="dense", w_blocksize=0
):
    check.operator(x, w if w_format == "dense" else x, a, b, bias)
    base = Base(whole_weight(w, w_scales, w_format, w_blocksize, x.dtype), bias)
    y, h = direct.forward(x, base, Adapter(a, b, scale, p, seed), backend, save_h)
    return y, _or_empty(h, a)


def _fake_forward(x, w, a, b, bias, scale, p, seed, backend, save_h, *quantised, **named):  # type: ignore
    return x.new_empty(x.shape[0], b.shape[0]), a.new_empty(x.shape[0], a.shape[0]) if save_h else a.new_empty(0)


def _run_backward(  # type: ignore[no-untyped-def]
    dy, x, w, a, b, h, scale, p, seed, backend, need_dx, need_da, need_db,
    w_scales=None, w_format="dense", w_blocksize=0,
):  # fmt: skip
    check.operator(dy, w if w_format == "dense" else dy, a, b, None)
    base, adapter = Base(whole_weight(w, w_scales, w_format, w_blocksize, dy.dtype)), Adapter(a, b, scale, p, seed)
    dx, da, db = direct.backward(dy, x, base, adapter, h, Needs(need_dx, (need_da,), (need_db,)), backend)
    return _or_empty(dx, dy), _or_empty(da, a), _or_empty(db, b)


def _fake_backward(  # type: ignore
    dy, x, w, a, b, h, scale, p, seed, backend, need_dx, need_da, need_db, *quantised, **named
):
    return (
        dy.new_empty(dy.shape[0], a.shape[1]) if need_dx else dy.new_empty(0),
        a.new_empty(a.shape) if need_da else a.new_empty(0),
        b.new_empty(b.shape) if need_db else b.new_empty(0),
    )


def _run_base_gemm(  # type: ignore[no-untyped-def]
    x, w, backend, bias=None, adapter_dtype=None, transposed=False, w_scales=None, w_format="dense", w_blocksize=0
):
    own = w if w_format == "dense" else x
    check.operator(x, own, own, own, bias)
    whole = whole_weight(w, w_scales, w_format, w_blocksize, x.dtype)
    return direct.base_gemm(x, whole, backend, bias, adapter_dtype, transposed)


def _fake_keep_mask(x, p, seed, backend):  # type: ignore
    return x.new_empty(x.shape)


def _fake_base_gemm(  # type: ignore
    x, w, backend, bias=None, adapter_dtype=None, transposed=False, w_scales=None, w_format="dense", w_blocksize=0
):
    N, K = w.shape if w_format == "dense" else shape_of(w, w_format)
    return x.new_empty(x.shape[0], K if transposed else N)


def _run_forward_group(  # type: ignore[no-untyped-def]
    x, w, a, b, bias, scale, p, seed, backend, save_h, w_scales=None, w_format=None, w_blocksize=None
):
    for own_w, own_a, own_b, own_bias in zip(_dense_or(x, w, w_format), a, b, bias, strict=True):
        check.operator(x, own_w, own_a, own_b, own_bias)
    w = each_weight(w, w_scales, w_format, w_blocksize, x.dtype)
    ys, hs = direct.forward_group(x, *_layers(w, bias, a, b, scale, p, seed), backend, save_h)
    return [*ys, *_each_or_empty(hs, a)]


def _fake_forward_group(x, w, a, b, bias, scale, p, seed, backend, save_h, *quantised, **named):  # type: ignore
    ys = [x.new_empty(x.shape[0], each.shape[0]) for each in b]
    hs = [
        each.new_empty(x.shape[0], each.shape[0]) if save else each.new_empty(0)
        for each, save in zip(a, save_h, strict=True)
    ]
    return [*ys, *hs]


def _run_backward_group(  # type: ignore[no-untyped-def]
    dy, x, w, a, b, h, scale, p, seed, backend, need_dx, need_da, need_db,
    w_scales=None, w_format=None, w_blocksize=None,
):  # fmt: skip
    for own_dy, own_w, own_a, own_b in zip(dy, _dense_or(dy[0], w, w_format), a, b, strict=True):
        check.operator(own_dy, own_w, own_a, own_b, None)
    w = each_weight(w, w_scales, w_format, w_blocksize, dy[0].dtype)
    bases, adapters = _layers(w, [None] * len(w), a, b, scale, p, seed)
    hs = [each if need else None for each, need in zip(h, need_db, strict=True)]
    needs = Needs(need_dx, tuple(need_da), tuple(need_db))
    dx, das, dbs = direct.backward_group(dy, x, bases, adapters, hs, needs, backend)
    return [_or_empty(dx, dy[0]), *_each_or_empty(das, a), *_each_or_empty(dbs, b)]


def _fake_backward_group(  # type: ignore
    dy, x, w, a, b, h, scale, p, seed, backend, need_dx, need_da, need_db, *quantised, **named
):
    dx = dy[0].new_empty(dy[0].shape[0], a[0].shape[1]) if need_dx else dy[0].new_empty(0)
    das = [each.new_empty(each.shape if need else 0) for each, need in zip(a, need_da, strict=True)]
    dbs = [each.new_empty(each.shape if need else 0) for each, need in zip(b, need_db, strict=True)]
    return [dx, *das, *dbs]


for _name, _run, _fake in (
    ("forward", _run_forward, _fake_forward),
    ("backward", _run_backward, _fake_backward),
    ("keep_mask", direct.keep_mask, _fake_keep_mask),
    ("base_gemm", _run_base_gemm, _fake_base_gemm),
    ("forward_group", _run_forward_group, _fake_forward_group),
    ("backward_group", _run_backward_group, _fake_backward_group),
):
    library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=library)
_forward_op = torch.ops.lora_kernels.forward.default
_backward_op = torch.ops.lora_kernels.backward.default
_keep_mask_op = torch.ops.lora_kernels.keep_mask.default
_base_gemm_op = torch.ops.lora_kernels.base_gemm.default
_forward_group_op = torch.ops.lora_kernels.forward_group.default
_backward_group_op = torch.ops.lora_kernels.backward_group.default
