"""The random calls of `lora_linear` and `lora_linear_group`, and what decides whether their results are right.

A kind of call of `benchmarks.fuzz` is a function of a `Draw`. It makes a call and returns what is wrong. Further kinds
are in the other files `fuzz_*.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.fuzz_draw import FORMATS, MOST, Draw, Layered, is_exact, problems
from lora_kernels import lora_linear, lora_linear_group
from lora_kernels.core.operands import Layer
from lora_kernels.quant.weight import QuantizedWeight
from lora_kernels.testing.judge import Problem, against_bound, judge, over_codes, rounding_bound, truth

Results = dict[str, Tensor]
LEAVES = ("x", "a", "b", "bias")


class _Look(TorchDispatchMode):
    """A mode that sees every operator and changes nothing: calls then go through the registered operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def surroundings(draw: Draw) -> Iterator[None]:
    """Draw the state of torch during a call: threads, deterministic algorithms, an observer. The judge works outside,
    on one thread."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with ExitStack() as stack:
        try:
            torch.set_num_threads(draw.pick("threads", (1, 1, 1, 1, 2, 3, 5, 8)))
            torch.use_deterministic_algorithms(draw.chance("deterministic", 0.5))
            if draw.chance("observed", 0.1):
                stack.enter_context(_Look())
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)


class Watched:
    """Tensors that a call reads. It must not write to them."""

    def __init__(self, *tensors: Tensor | QuantizedWeight | None) -> None:
        self.kept = [
            (part, part.detach().clone())
            for t in tensors
            if t is not None
            for part in (t.tensors if isinstance(t, QuantizedWeight) else (t,))
        ]

    def faults(self) -> list[str]:
        """Return a fault for each that has changed."""
        return [
            f"an operand of shape {tuple(now.shape)} was written"
            for now, before in self.kept
            if not torch.equal(_comparable(now.detach()), _comparable(before))
        ]


def _comparable(t: Tensor) -> Tensor:
    """Return a tensor that `torch.equal` takes: codes of fp8 as bytes."""
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t


def leaves(draw: Draw, q: Problem) -> dict[str, Tensor]:
    """Return x, a, b and bias as leaves of autograd, of which a random part wants gradients."""
    found = {name: t.detach() for name in LEAVES if (t := getattr(q, name)) is not None}
    asked = [name for name in found if draw.random.random() < 0.75]
    draw.say("needs", "+".join(asked) or "none")
    return {name: t.requires_grad_(name in asked) for name, t in found.items()}


def lead(draw: Draw, x: Tensor) -> tuple[int, ...]:
    """Return leading dimensions for the rows of x."""
    M = x.shape[0]
    if draw.random.random() < 0.6:
        return (M,)
    shapes = [(1, M), (M, 1), *(((),) if M == 1 else ()), *(((n, M // n),) if (n := 3) and M and not M % 3 else ())]
    return draw.pick("lead", shapes)


def results(y: Tensor, dy: Tensor, tensors: Mapping[str, Tensor]) -> Results:
    """Return y as rows, and the gradient of every leaf that wants one."""
    if y.requires_grad:
        y.backward(dy.reshape(y.shape) if y.shape != dy.shape else dy)
    got = {f"d{name}": t.grad for name, t in tensors.items() if t.requires_grad}
    return {"y": y.detach().reshape(dy.shape), **{name: t for name, t in got.items() if t is not None}}


def missing(y: Tensor, got: Results, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a fault for each gradient that is not there, or has another dtype or size than its leaf."""
    faults = []
    for name, t in tensors.items():
        grad = got.get(f"d{name}")
        if t.requires_grad and (grad is None or grad.dtype != t.dtype or grad.shape != t.shape):
            faults.append(f"d{name} is {None if grad is None else (grad.dtype, tuple(grad.shape))}")
    return faults


def wrong(draw: Draw, got: Results, one: Layered, q: Problem) -> list[str]:
    """Return the faults of the results of one layer: q is its problem as it was computed."""
    if draw.exact:
        return unequal(got, truth(q))
    if one.codes is not None:
        stored, plain = over_codes(q, one.codes)
        return [v.fault for v in judge(got, stored, plain=plain) if v.fault]
    return [v.fault for v in judge(got, q) if v.fault]


def unequal(got: Results, want: Mapping[str, Tensor]) -> list[str]:
    """Return a fault for each result that differs from the truth in any bit. Both signs of zero count as equal."""
    faults = []
    for name, value in got.items():
        exact = want[name]
        if value.shape != exact.shape or not torch.equal(value.double(), exact):
            bad = (value.double() != exact).nonzero() if value.shape == exact.shape else []
            at = tuple(bad[0].tolist()) if len(bad) else ()
            detail = (
                f"at {at}: {value[at].item()}, expected {exact[at].item()}" if at else f"shape {tuple(value.shape)}"
            )
            faults.append(f"{name} differs in {len(bad)} elements, {detail}")
    return faults


def linear(draw: Draw) -> list[str]:
    """`lora_linear`, over a dense or a quantised weight."""
    format = draw.pick("w", ["dense", "dense", "dense", *FORMATS])
    (one,) = problems(draw, 1, format)
    q, tensors = one.q, leaves(draw, one.q)
    cast = None
    if q.x.dtype != torch.float64 and draw.chance("autocast", 0.1):
        cast = draw.pick("to", (torch.bfloat16, torch.float16) if q.x.dtype == torch.float32 else (q.x.dtype,))
    computed = q if cast is None else under_autocast(q, cast)
    if draw.exact and cast is not None and not is_exact(computed, MOST[cast]):
        cast, computed = None, q
    backend = draw.pick("backend", (None, None, None, "cpu", "eager")) if q.x.dtype != torch.float64 else None
    scale: Any = (
        torch.tensor(q.scale, dtype=torch.promote_types(q.a.dtype, torch.float32))
        if draw.chance("scale-tensor", 0.15)
        else q.scale
    )
    shape, watched = (*lead(draw, q.x), q.x.shape[1]), Watched(q.x, one.w, q.a, q.b, q.bias, q.dy)
    dy = computed.dy

    def call() -> Results:
        for t in tensors.values():
            t.grad = None
        with torch.autocast("cpu", dtype=cast, enabled=cast is not None):
            y = lora_linear(
                tensors["x"] if len(shape) == 2 else tensors["x"].view(shape), one.w, tensors["a"], tensors["b"],
                scale=scale, bias=tensors.get("bias"), dropout_p=q.p, seed=q.seed, backend=backend,
            )  # fmt: skip
        return results(y, dy, tensors)

    with surroundings(draw):
        got, faults = twice(draw, call)
    faults += missing(got["y"], got, tensors) + watched.faults()
    if got["y"].dtype != computed.x.dtype:
        faults.append(f"y is {got['y'].dtype}, expected {computed.x.dtype}")
    return faults + wrong(draw, as_computed(got, computed), one, computed)


def under_autocast(q: Problem, dtype: torch.dtype) -> Problem:
    """Return the problem with the dtypes in which it is computed under autocast: fp32 adapters stay."""
    a, b = (t if t.dtype == torch.float32 else t.to(dtype) for t in (q.a, q.b))
    bias = None if q.bias is None else q.bias.to(dtype)
    w = q.w if q.w.dtype == torch.float32 and q.x.dtype != torch.float32 else q.w.to(dtype)
    return replace(q, x=q.x.to(dtype), w=w, a=a, b=b, bias=bias, dy=q.dy.to(dtype))


def as_computed(got: Results, q: Problem) -> Results:
    """Return results in the dtypes of the computation: under autocast the gradients of leaves are converted."""
    of = {"dx": q.x, "da": q.a, "db": q.b, "dbias": q.bias}
    return {name: t if (like := of.get(name)) is None else t.to(like.dtype) for name, t in got.items()}


def twice(draw: Draw, call: Callable[[], Results]) -> tuple[Results, list[str]]:
    """Return the results of a call; in some draws it is made again, which must give the same bits."""
    first = call()
    if draw.random.random() < 0.85:
        return first, []
    second = call()
    return first, [f"{name} changes from run to run" for name, t in first.items() if not torch.equal(t, second[name])]


def group(draw: Draw) -> list[str]:
    """`lora_linear_group`."""
    ones = problems(draw, draw.pick("layers", (1, 2, 2, 3, 4)))
    x = ones[0].q.x.detach().requires_grad_(draw.random.random() < 0.8)
    tensors = [leaves(draw, one.q) | {"x": x} for one in ones]
    used = [draw.random.random() < 0.9 for _ in ones]
    backend = draw.pick("backend", (None, "cpu", "eager")) if x.dtype != torch.float64 else None
    watched = Watched(x, *(t for one in ones for t in (one.q.w, one.q.a, one.q.b, one.q.bias, one.q.dy)))
    layers = [
        Layer(one.q.w, own["a"], own["b"], one.q.scale, own.get("bias"), one.q.p, one.q.seed)
        for one, own in zip(ones, tensors, strict=True)
    ]
    with surroundings(draw):
        ys = lora_linear_group(x, layers, backend=backend)
        ends = [(y, one.q.dy) for y, one, use in zip(ys, ones, used, strict=True) if use and y.requires_grad]
        if ends:
            torch.autograd.backward([y for y, _ in ends], [dy for _, dy in ends])
    faults, dx, bound = (
        watched.faults(),
        torch.zeros(x.shape, dtype=torch.float64),
        torch.zeros(x.shape, dtype=torch.float64),
    )
    for y, one, own, use in zip(ys, ones, tensors, used, strict=True):
        got = {f"d{name}": t.grad for name, t in own.items() if name != "x" and t.grad is not None}
        faults += missing(y, got, {name: t for name, t in own.items() if name != "x"}) if use else []
        faults += wrong(draw, {"y": y.detach(), **(got if use else {})}, one, one.q)
        if use and x.requires_grad:
            want, magnitude = truth(one.q), truth(one.q.absolute())
            dx += want["dx"]
            own_eps = torch.finfo(x.dtype).eps / 2
            bound += rounding_bound("dx", one.q, want["dx"], magnitude["dx"]) + len(ones) * own_eps * magnitude["dx"]
    if x.grad is not None:
        faults += compare(draw, "dx", x.grad, dx, bound)
    return faults


def compare(draw: Draw, name: str, value: Tensor, exact: Tensor, bound: Tensor) -> list[str]:
    """Return the fault of one result, if it has one."""
    if draw.exact:
        return unequal({name: value}, {name: exact})
    fault = against_bound(name, value, exact, bound).fault if torch.isfinite(value).all() else f"{name} is not finite"
    return [fault] if fault else []


def run_layer(draw: Draw, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a layer, in some draws inside activation checkpointing or compiled."""
    how = draw.random.random()
    if how < 0.1:
        reentrant = draw.pick("checkpoint, reentrant", (True, False)) and x.requires_grad
        return checkpoint(layer, x, use_reentrant=reentrant)  # type: ignore[no-any-return]
    if how > 0.995:
        draw.said.append("compiled")
        torch._dynamo.reset()
        return torch.compile(layer, backend="aot_eager")(x)  # type: ignore[no-any-return]
    return layer(x)
