"""The random calls of `lora_linear_multi` of `benchmarks.fuzz`: every adapter is judged as a layer of its own over its
own rows, and the rows without one as a layer whose adapter is zero."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.fuzz_calls import Results, Watched, lead, surroundings, twice, unequal, wrong
from benchmarks.fuzz_draw import FORMATS, MOST, PART, Draw, Layered, is_exact, problems
from lora_kernels import Adapter, AdapterStack, Rows, lora_linear_multi
from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Adapter as Operands
from lora_kernels.core.operands import Base, call_of
from lora_kernels.testing.judge import Problem

RANKS = 24


class Own(NamedTuple):
    """One adapter of a call, with its problem over its own rows."""

    i: int
    given: Adapter
    q: Problem
    rows: Tensor
    leaves: dict[str, Tensor]
    """The tensors that want a gradient, by the name of their gradient without the d."""


def multi(draw: Draw) -> list[str]:
    """`lora_linear_multi`, over a dense or a quantised weight, with a list of adapters or a stack."""
    (one,) = problems(draw, 1, draw.pick("w", ["dense", "dense", "dense", *FORMATS]))
    q = one.q
    stack = draw.chance("stack", 0.25)
    ids, n = _ids(draw, q.x.shape[0])
    owns = [own for i in range(n) if (own := _own(draw, one, i, ids, stack)) is not None]
    asked = draw.random.random()
    x = q.x.detach().requires_grad_(asked < 0.75)
    bias = None if q.bias is None else q.bias.detach().requires_grad_(0.3 < asked < 0.9)
    given: list[Adapter | None] = [None] * n
    for own in owns:
        given[own.i] = own.given
    backend = _backend(draw, one)
    rows, shape = Rows.by_id(ids, n), (*lead(draw, q.x), q.x.shape[1])
    tensors = {"x": x, **({} if bias is None else {"bias": bias})}
    tensors |= {f"{name} {own.i}": t for own in owns for name, t in own.leaves.items()}
    operands = [t for own in owns for t in own.given if isinstance(t, Tensor)]
    watched = Watched(q.x, one.w, q.bias, q.dy, *operands)
    adapters = AdapterStack(given) if stack else given

    def call() -> Results:
        for t in tensors.values():
            t.grad = None
        y = lora_linear_multi(
            x if len(shape) == 2 else x.view(shape), one.w, adapters, rows, bias=bias, backend=backend
        )
        if y.requires_grad:
            y.backward(q.dy.reshape(y.shape))
        grads = {f"d{name}": t.grad for name, t in tensors.items() if t.grad is not None}
        return {"y": y.detach().reshape(q.dy.shape), **grads}

    with surroundings(draw):
        got, faults = twice(draw, call)
    faults += watched.faults()
    bare = torch.ones(ids.shape, dtype=torch.bool)
    for own in owns:
        bare[own.rows] = False
        faults += [f"adapter {own.i}: {fault}" for fault in _faults(draw, one, own, got, tensors)]
    N, K = q.w.shape
    zero = replace(q, x=q.x[bare], dy=q.dy[bare], a=q.a.new_zeros(1, K), b=q.b.new_zeros(N, 1), p=0.0, seed=None)
    of_rows = {name: got[name][bare] for name in ("y", "dx") if name in got}
    faults += [f"without an adapter: {fault}" for fault in wrong(draw, of_rows, one, zero)]
    faults += wrong(draw, {"dbias": got["dbias"]}, one, q) if "dbias" in got else []
    return faults


def _ids(draw: Draw, M: int) -> tuple[Tensor, int]:
    """Return ids [M], and the number of adapters: drawn one by one, in segments, or all alike."""
    n = draw.size("n", max(1, min(M + 1, 9)))
    how = draw.pick("ids", ("mixed", "mixed", "segments", "alike", "strided"))
    if how == "mixed":
        return torch.randint(-1, n, (M,), generator=draw.generator), n
    if how == "segments":
        return torch.randint(-1, n, (M,), generator=draw.generator).sort(descending=draw.random.random() < 0.5)[0], n
    if how == "alike":
        return torch.full((M,), draw.random.randint(-1, n - 1)), n
    return torch.arange(M) % (n + 1) - 1, n


def _own(draw: Draw, one: Layered, i: int, ids: Tensor, stack: bool) -> Own | None:
    """Return a random adapter over its rows of the problem, or None for one that has nothing in the layer."""
    q = one.q
    if draw.random.random() < 0.1:
        return None
    rows, (N, K) = (ids == i).nonzero()[:, 0], q.w.shape
    R = draw.size(f"R{i}", 300 if draw.random.random() < 0.05 else RANKS)
    drops = (0.0, 0.0, 0.5, 0.75) if draw.exact else (0.0, 0.0, 0.05, 0.5, 0.9)
    p = 0.0 if stack else draw.random.choice(drops)
    scale = draw.random.choice((1.0, 2.0, -1.0, 0.5, 0.0) if draw.exact else (1.0, 0.75, -1.3, 0.0, 16.0))
    seed = torch.tensor(draw.random.getrandbits(62)) if p else None
    own_bias = draw.numbers(1, N, 1.0, 0.5)[0].to(q.a.dtype) if draw.exact and not stack else None
    bias = q.bias if own_bias is None else (scale * own_bias + (0 if q.bias is None else q.bias)).to(q.x.dtype)
    part = PART[q.x.dtype]
    while True:
        a = draw.layout("a", draw.numbers(R, K, max(K, 1) ** -0.5, min(0.5, part)).to(q.a.dtype))
        b = draw.layout("b", draw.numbers(N, R, R**-0.5, min(1.0, part * 3 / R)).to(q.a.dtype))
        own = Problem(q.x[rows], q.w, a, b, bias, q.dy[rows], scale, p, seed)
        if not draw.exact or is_exact(own, MOST[q.x.dtype]):
            break
        if part < 1e-4:
            return None
        part /= 3
    kinds = {"a": a, "b": b, **({} if own_bias is None else {"own": own_bias})}
    leaves = {name: t.detach() for name, t in kinds.items()}
    wanted = [] if stack else [name for name in leaves if draw.random.random() < 0.75]
    for name in wanted:
        leaves[name].requires_grad_()
    given = Adapter(leaves["a"], leaves["b"], scale, p, seed, leaves.get("own"))
    return Own(i, given, own, rows, {name: leaves[name] for name in wanted})


def _faults(draw: Draw, one: Layered, own: Own, got: Results, tensors: dict[str, Tensor]) -> list[str]:
    """Return what is wrong with the rows of one adapter, and with its gradients."""
    faults = []
    for name in own.leaves:
        t, grad = tensors[f"{name} {own.i}"], got.get(f"d{name} {own.i}")
        if not len(own.rows):
            faults += [] if grad is None else [f"d{name} is not None without rows"]
        elif grad is None or grad.dtype != t.dtype or grad.shape != t.shape:
            faults.append(f"d{name} is {None if grad is None else (grad.dtype, tuple(grad.shape))}")
    if faults or not len(own.rows):
        return faults
    results = {name: got[name][own.rows] for name in ("y", "dx") if name in got}
    results |= {f"d{name}": got[f"d{name} {own.i}"] for name in own.leaves if name != "own"}
    faults += wrong(draw, results, one, own.q)
    if "own" in own.leaves:
        exact = own.q.scale * own.q.dy.double().sum(0)
        faults += unequal({"dbias of its own": got[f"down {own.i}"]}, {"dbias of its own": exact})
    return faults


def _backend(draw: Draw, one: Layered) -> str | None:
    """Return a back-end that serves many adapters of these dtypes, or None for the automatic choice."""
    q = one.q
    call = call_of("forward_multi", q.x, Base(one.w), Operands(q.a, q.b, 1.0, 0.5))
    able = [name for name in ("cpu", "eager") if not dispatch.refusals(name, call)]
    return draw.pick("backend", (None, *able))
