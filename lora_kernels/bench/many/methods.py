"""The ways to compute a layer with many adapters that the suite `many` times, all over the same x and W.

F.linear           the frozen layer, whose backward goes to x only
lora_linear_multi  this package, all adapters in one call. It serves an `AdapterStack` and trains a list of `Adapter`
PEFT               PEFT's lora.Linear with one adapter name for each sample. A model of PEFT refuses names in training,
                   so there the layer is called
PEFT switched      PEFT's lora.Linear, one adapter after the other by ``set_adapter``, each with its own rows
looped             this package's `lora_linear` for each adapter in turn. Where the rows come in random order, they are
                   gathered and put back
addmm_             the base once, then two products of torch for each adapter over its rows. These lie sorted before the
                   clock starts, so it is the least time that torch's own operations need
our base           x Wᵀ by this package's own choice of a GEMM, without any adapter
single             a single adapter, by `lora_linear`

Methods that take one adapter at a time, and do not gather, get each adapter's rows as a tensor of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_kernels.backends import dispatch
from lora_kernels.bench.many.cells import (
    BASE_ONLY,
    DECODE,
    FLOOR,
    FROZEN,
    LOOP,
    ONE,
    OURS,
    OWN,
    PEFT,
    SWITCHED,
    TRAINING,
    Batch,
    Cell,
)
from lora_kernels.core.many import Adapter, AdapterStack
from lora_kernels.core.rows import Rows
from lora_kernels.ops.linear import lora_linear
from lora_kernels.ops.multi import lora_linear_multi

Rowwise = Tensor | list[Tensor]
"""Rows of a batch: in its order, or one tensor for each adapter."""


class Results(NamedTuple):
    """What a method computes. A forward gives y only."""

    y: Rowwise
    dx: Rowwise | None = None
    da: tuple[Tensor | None, ...] = ()
    db: tuple[Tensor | None, ...] = ()


Run = Callable[[], Results]


@dataclass(frozen=True)
class Method:
    """A way to compute a batch."""

    name: str
    build: Callable[[Batch], Run]
    """Return the function that is timed."""
    kinds: tuple[str, ...] = (DECODE, TRAINING)
    """The kinds of cells in which it is measured."""
    wanted: Callable[[Cell], bool] = lambda cell: True
    """Whether it is measured in a cell of these kinds."""
    own_masks: bool = False
    """Whether it draws dropout masks that are not those of this package, and cannot be judged with dropout."""
    whole: bool = True
    """Whether it computes the layer with its adapters."""


def methods(cell: Cell, backend: str | None) -> tuple[list[Method], list[str]]:
    """Return the methods that are measured in a cell, F.linear first, and notes on those that cannot be measured."""
    found, notes = [Method(FROZEN, _frozen, (DECODE, TRAINING, BASE_ONLY), whole=False)], []
    if importlib.util.find_spec("peft") is None:
        notes.append("PEFT is not measured: it is not installed (pip install peft)")
    else:
        found.append(Method(PEFT, _peft, (DECODE, TRAINING, BASE_ONLY), own_masks=True))
        found.append(Method(SWITCHED, _switched, own_masks=True))
    found.append(Method(LOOP, functools.partial(_looped, backend), wanted=lambda cell: cell.n > 1))
    found.append(Method(FLOOR, _addmm, own_masks=True))
    try:
        dispatch.load("cpu")
    except ImportError as error:
        notes.append(f"{OWN} is not measured: {error}")
    else:
        found.append(Method(OWN, _own_base, (DECODE,), lambda cell: cell.M <= 8, whole=False))
    found.append(Method(ONE, functools.partial(_one, backend), wanted=lambda cell: cell.n == 1))
    found.append(Method(OURS, functools.partial(_multi, backend), (DECODE, TRAINING, BASE_ONLY)))
    return [method for method in found if cell.kind in method.kinds and method.wanted(cell)], notes


def _frozen(q: Batch) -> Run:
    return _step(q, lambda x: F.linear(x, q.w), (), ())


def _own_base(q: Batch) -> Run:
    cpu = dispatch.load("cpu")
    return _step(q, lambda x: cpu.base_gemm(x, q.w, None), (), ())


def _multi(backend: str | None, q: Batch) -> Run:
    rows = Rows.by_id(q.ids, q.cell.n)
    if not q.cell.training:
        stack = AdapterStack(Adapter(a, b, s) for a, b, s in zip(q.a, q.b, q.scales, strict=True))
        return _step(q, lambda x: lora_linear_multi(x, q.w, stack, rows, backend=backend), (), ())
    a, b = _leaves(q.a), _leaves(q.b)
    adapters = [Adapter(*each) for each in zip(a, b, q.scales, [q.cell.p] * q.cell.n, q.seeds, strict=True)]
    return _step(q, lambda x: lora_linear_multi(x, q.w, adapters, rows, backend=backend), a, b)


def _looped(backend: str | None, q: Batch) -> Run:
    if q.cell.training:
        return _each(q, functools.partial(_of_one, backend, q), _leaves(q.a), _leaves(q.b))

    def gathered(x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], q.w.shape[0])
        for i, mine in enumerate(q.numbers):
            y[mine] = _of_one(backend, q, i, x[mine], q.a[i], q.b[i])
        return y

    return _step(q, gathered, (), ())


def _one(backend: str | None, q: Batch) -> Run:
    a, b = _leaves(q.a), _leaves(q.b)
    return _step(q, lambda x: _of_one(backend, q, 0, x, a[0], b[0]), a, b)


def _of_one(backend: str | None, q: Batch, i: int, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    more: dict[str, Any] = {"dropout_p": q.cell.p, "seed": q.seeds[i], "backend": backend}
    return lora_linear(x, q.w, a, b, scale=q.scales[i], **more)


def _peft(q: Batch) -> Run:
    layer, a, b = _peft_layer(q)
    if not q.cell.training:
        names = [str(i) if i >= 0 else "__base__" for i in q.ids.tolist()]
        return _step(q, lambda x: layer(x, adapter_names=names), (), ())
    each, names = (q.cell.n, q.cell.M // q.cell.n, q.cell.width), [str(i) for i in range(q.cell.n)]
    return _step(q, lambda x: layer(x.view(each), adapter_names=names).view(q.dy.shape), a, b)


def _switched(q: Batch) -> Run:
    layer, a, b = _peft_layer(q)

    def one(i: int, x: Tensor, *_: Tensor) -> Tensor:
        layer.set_adapter(str(i))
        return layer(x)  # type: ignore[no-any-return]

    return _each(q, one, a, b)


def _addmm(q: Batch) -> Run:
    if q.cell.training:
        a, b, apply = _leaves(q.a), _leaves(q.b), _Addmm.apply
        return _step(q, lambda x: apply(q, x, *a, *b), a, b)
    sorted_x = torch.cat([x for x, _ in q.parts])
    bounds = torch.tensor([0, *(len(mine) for mine in q.numbers)]).cumsum(0).tolist()

    def run() -> Results:
        with torch.no_grad():
            y = F.linear(sorted_x, q.w)
            parts = [y[first:last] for first, last in itertools.pairwise(bounds)]
            for i, part in enumerate(parts):
                h = sorted_x[bounds[i] : bounds[i + 1]] @ q.a[i].t()
                part.addmm_(h, q.b[i].t(), alpha=q.scales[i])
        return Results(parts)

    return run


class _Addmm(torch.autograd.Function):
    """The floor in training: the base once in each direction, then torch's own products over the rows of each adapter,
    which follow each other. Nothing of it passes through autograd piece by piece."""

    @staticmethod
    def forward(ctx: Any, q: Batch, x: Tensor, *leaves: Tensor) -> Tensor:
        y, p, saved = F.linear(x, q.w), q.cell.p, []
        for i, (rows, a, b) in enumerate(_segments(q, leaves)):
            x_hat, mask = torch.native_dropout(x[rows], p, True) if p else (x[rows], None)
            h = x_hat @ a.t()
            y[rows].addmm_(h, b.t(), alpha=q.scales[i])
            saved += [x_hat, mask, h]
        ctx.save_for_backward(*saved, *leaves)
        ctx.q = q
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, n = ctx.q, ctx.q.cell.n
        saved, leaves = ctx.saved_tensors[: 3 * n], ctx.saved_tensors[3 * n :]
        dx, das, dbs = dy @ q.w, [], []
        for i, (rows, a, b) in enumerate(_segments(q, leaves)):
            x_hat, mask, h = saved[3 * i : 3 * i + 3]
            g = (dy[rows] @ b).mul_(q.scales[i])
            if q.cell.p:
                dx[rows] += torch.ops.aten.native_dropout_backward(g @ a, mask, 1 / (1 - q.cell.p))
            else:
                dx[rows].addmm_(g, a)
            das.append(g.t() @ x_hat)
            dbs.append((h.t() @ dy[rows]).mul_(q.scales[i]).t())
        return None, dx, *das, *dbs


def _segments(q: Batch, leaves: tuple[Tensor, ...]) -> list[tuple[slice, Tensor, Tensor]]:
    """Return (rows, a, b) of each adapter of a batch whose rows are sorted."""
    n, each = q.cell.n, q.cell.M // q.cell.n
    return [(slice(i * each, (i + 1) * each), leaves[i], leaves[n + i]) for i in range(n)]


def _step(q: Batch, layer: Callable[[Tensor], Tensor], a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Run:
    """Return a function that runs a layer over the whole batch: its forward without gradients, or its forward +
    backward with the gradients of x, `a` and `b`."""
    if not q.cell.training:

        def forward() -> Results:
            with torch.no_grad():
                return Results(layer(q.x))

        return forward
    x = q.x.detach().requires_grad_()
    wanted = (x, *a, *b)

    def both() -> Results:
        y = layer(x)
        dx, *of_adapters = torch.autograd.grad(y, wanted, q.dy)
        return Results(y, dx, tuple(of_adapters[: len(a)]), tuple(of_adapters[len(a) :]))

    return both


def _each(q: Batch, layer: Callable[[int, Tensor, Tensor, Tensor], Tensor], a: Any, b: Any) -> Run:
    """Return a function that runs ``layer(i, x_i, a_i, b_i)`` for one adapter after the other, each over its own
    rows."""
    if not q.cell.training:

        def forward() -> Results:
            with torch.no_grad():
                return Results([layer(i, x, a[i], b[i]) for i, (x, _) in enumerate(q.parts)])

        return forward
    parts = [(x.detach().requires_grad_(), dy) for x, dy in q.parts]

    def both() -> Results:
        ys, grads = [], []
        for i, (x, dy) in enumerate(parts):
            y = layer(i, x, a[i], b[i])
            grads.append(torch.autograd.grad(y, (x, a[i], b[i]), dy))
            ys.append(y)
        dx, da, db = zip(*grads, strict=True)
        return Results(ys, list(dx), da, db)

    return both


def _peft_layer(q: Batch) -> tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return PEFT's layer with the batch's adapters, named "0", "1", and so on, and every A and B."""
    from peft import LoraConfig, get_peft_model

    base = nn.Linear(q.w.shape[1], q.w.shape[0], False, device="meta", dtype=q.w.dtype)
    base.weight = nn.Parameter(q.w, requires_grad=False)
    model: Any = nn.Sequential(base)
    for i, (a, scale) in enumerate(zip(q.a, q.scales, strict=True)):
        R: Any = a.shape[0]
        config = LoraConfig(r=R, lora_alpha=scale * R, lora_dropout=q.cell.p, target_modules=["0"])
        model = model.add_adapter(str(i), config) or model if i else get_peft_model(model, config, "0")
    layer = model.base_model.model[0]
    found = []
    for modules, values in ((layer.lora_A, q.a), (layer.lora_B, q.b)):
        for i, value in enumerate(values):
            modules[str(i)].weight = nn.Parameter(value.clone())
        found.append(tuple(modules[str(i)].weight for i in range(q.cell.n)))
    return layer.train(q.cell.training), *found


def _leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in tensors)
