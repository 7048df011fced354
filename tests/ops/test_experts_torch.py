"""Experts: what is saved and allocated, autocast, activation checkpointing, and what observes operators."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from support import judging
from support.experts_calls import Experts, Largest, check, experts, run
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_kernels import Rows, lora_linear_experts
from lora_kernels.ops import experts_function, registered_experts

pytestmark = pytest.mark.usefixtures("one_thread")

FORWARD = torch.ops.lora_kernels.forward_experts.default
BACKWARD = torch.ops.lora_kernels.backward_experts.default


def call(m: Experts, x: Tensor, a: Tensor | None = None, b: Tensor | None = None, **kwargs) -> Tensor:
    a, b = m.a if a is None else a, m.b if b is None else b
    how = {"scale": m.scale, "bias": m.bias, "dropout_p": m.p, "seed": m.seed}
    return lora_linear_experts(x, m.w, a, b, m.rows, **how | kwargs)


def trained(m: Experts) -> tuple[Experts, Tensor]:
    """Return the problem with parameters, as a model has them, and an x that wants a gradient."""
    a, b, w = nn.Parameter(m.a), nn.Parameter(m.b), nn.Parameter(m.w, requires_grad=False)
    return replace(m, a=a, b=b, w=w), m.x.detach().clone().requires_grad_()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_x_and_h_are_saved_and_nothing_else(p, backend):
    m, x = trained(experts(24, 40, 8, rest=2, p=p, bias=False, layout="peft"))
    (M, K), R, seed = m.x.shape, 8, 8 if p else 0
    rows = m.rows
    how = {"scale": 1.0, "dropout_p": p, "seed": m.seed, "backend": backend}
    saved = judging.saved_bytes(lambda: lora_linear_experts(x, m.w, m.a, m.b, rows, **how))
    assert saved == 4 * M * (K + R) + seed
    frozen = m.a.detach()
    saved = judging.saved_bytes(lambda: lora_linear_experts(x, m.w, frozen, m.b, rows, **how))
    assert saved == 4 * M * R + 4 * frozen.numel() + seed  # h alone; A is no parameter here
    saved = judging.saved_bytes(lambda: lora_linear_experts(x, m.w, m.a, m.b.detach(), rows, **how))
    assert saved == 4 * M * K + 4 * m.b.numel() + seed


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_of_the_size_of_the_stack_or_twice_y_is_made(p, autocast, backend, monkeypatch):
    """Of W at most one expert is converted, and no result is made twice."""
    monkeypatch.setattr(experts_function, "watched", lambda *operands: False)  # look inside of the operators
    N, K, R = 60, 80, 2
    m, x = trained(experts(N, K, R, (3, 0, 9, 2, 4, 1), rest=2, p=p, layout="peft"))
    M = m.x.shape[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Largest() as forward:
        y = call(m, x, backend=backend)
    with Largest() as backward:
        y.backward(m.dy.to(y.dtype))
    most = max(M * K, N * K, 6 * R * (N + 32))  # B as the kernel reads it has padded rows
    assert forward.elements <= most < 6 * N * K, forward.by
    assert backward.elements <= most, backward.by


def test_y_is_the_only_new_memory_of_its_size(backend, monkeypatch):
    monkeypatch.setattr(experts_function, "watched", lambda *operands: False)

    class Sizes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[int] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "empty" in str(func) or "zeros" in str(func):
                self.made.append(out.numel())
            return out

    m = experts(50, 8, 2, (30, 41), bias=False)
    with torch.no_grad(), Sizes() as sizes:
        call(m, m.x, backend=backend)
    assert [size for size in sizes.made if size >= 30 * 50] == [71 * 50]


def test_autocast_saves_x_once_and_converts_one_expert_at_a_time():
    m, x = trained(experts(24, 40, 8, rest=2, bias=True))
    M, K, R = *m.x.shape, 8

    def layer():
        with torch.autocast("cpu", torch.bfloat16):
            return call(m, x, bias=None)

    assert judging.saved_bytes(layer) == 2 * M * K + 4 * M * R  # fp32 adapters have an h in fp32
    with torch.autocast("cpu", torch.bfloat16):
        got = run(m)
    cast = replace(m, x=m.x.bfloat16(), w=m.w.bfloat16(), dy=m.dy.bfloat16(), bias=m.bias.bfloat16())
    want = run(cast)
    assert got["y"].dtype == torch.bfloat16 and got["dx"].dtype == torch.float32
    check(cast, got | {"dx": got["dx"].bfloat16(), "dbias": got["dbias"].bfloat16()})
    assert torch.equal(got["da"], want["da"]) and torch.equal(got["db"], want["db"])


def test_autocast_leaves_fp64_alone_and_converts_adapters_in_16_bits():
    m = experts(24, 40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(experts(4, 3, 2, (2, 1), dtype=torch.float64))["y"].dtype == torch.float64
        y = call(m, m.x, m.a.half(), m.b.half())
    halves = m.a.half().bfloat16(), m.b.half().bfloat16()
    cast = replace(m, x=m.x.bfloat16(), w=m.w.bfloat16(), bias=m.bias.bfloat16())
    torch.testing.assert_close(y, call(cast, cast.x, *halves))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_drawn_seeds(reentrant):
    m, _ = trained(experts(24, 40, 8, p=0.5))
    results = []
    for kept in (False, True):
        x = m.x.detach().clone().requires_grad_()
        m.a.grad = m.b.grad = None

        def layer(x):
            return call(m, x.sin(), seed=None)

        torch.manual_seed(4)
        y = checkpoint(layer, x, use_reentrant=reentrant) if kept else layer(x)
        y.backward(m.dy)
        results.append([y.detach(), x.grad, m.a.grad, m.b.grad])
    assert all(torch.equal(t, u) for t, u in zip(*results, strict=True))


class Seen(TorchDispatchMode):
    """Records the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_kernels":
            self.ours.append(func)
        return func(*args, **(kwargs or {}))


def test_operators_are_called_where_something_observes_them_only(monkeypatch):
    m, names = experts(24, 40, 8, rest=2, p=0.3), []
    for name in ("_forward_op", "_backward_op"):
        inner = getattr(registered_experts, name)
        monkeypatch.setattr(
            registered_experts, name, lambda *args, inner=inner, name=name: names.append(name) or inner(*args)
        )
    want = run(m)
    assert names == []
    with Seen() as seen:
        got = run(m)
    assert seen.ours == [FORWARD, BACKWARD]
    assert all(torch.equal(got[name], want[name]) for name in want)
    with torch.profiler.profile() as profile:
        run(m)
    events = [event.name for event in profile.events()]
    assert events.count("lora_kernels::forward_experts") == events.count("lora_kernels::backward_experts") == 1


@pytest.mark.parametrize("place", ["x", "w", "a", "b", "bias"])
def test_lazily_negated_operands_are_served(place):
    m = experts(24, 40, 8, rest=2)
    want = run(replace(m, **{place: -getattr(m, place)}), wanted=[])
    got = run(replace(m, **{place: torch._neg_view(getattr(m, place))}), wanted=[])
    assert torch.equal(got["y"], want["y"])


def test_the_operators_pass_opcheck():
    m = experts(6, 4, 2, (3, 0, 2), rest=1, p=0.2)
    adapter, rows = (m.scale, m.p, m.seed), (m.rows.order, m.rows.starts)
    forward = (m.x, m.w, m.a, m.b, m.bias, *adapter, *rows, None, True)
    torch.library.opcheck(FORWARD, forward)
    _, h = FORWARD(*forward)
    torch.library.opcheck(BACKWARD, (m.dy, m.x, m.w, m.a, m.b, h, *adapter, *rows, None, True, True, True))
    torch.library.opcheck(BACKWARD, (m.dy, None, m.w, m.a, m.b, h, *adapter, *rows, None, True, False, True))


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_graphs_of_make_fx_hold_the_operator(tracing):
    m = experts(6, 4, 2, (3, 0, 2), rest=1)
    rows = m.rows

    def layer(x):
        return lora_linear_experts(x, m.w, m.a, m.b, rows, scale=2.0)

    with torch.no_grad():
        graph = make_fx(layer, None, tracing, _allow_non_fake_inputs=True)(m.x)
    assert FORWARD in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(m.x), layer(m.x))


def test_double_backward_and_several_gradients_at_once_are_refused():
    m, x = trained(experts(24, 40, 8))
    (dx,) = torch.autograd.grad(call(m, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear_experts has no double backward"):
        dx.sum().backward()
    with pytest.raises(RuntimeError, match=r"one dy at a time.*is_grads_batched"):
        torch.autograd.grad(call(m, x), x, torch.randn(3, *m.dy.shape), is_grads_batched=True)


def test_a_zero_dy_without_memory_is_served():
    m, x = trained(experts(24, 40, 8))
    torch.sgn(call(m, x)).sum().backward()
    assert not x.grad.any() and not m.a.grad.any() and not m.b.grad.any()


def test_rows_may_be_copied_and_stay_in_order():
    m = experts(24, 40, 8, rest=2)
    want = run(m)["y"]
    for rows in (copy.deepcopy(m.rows), pickle.loads(pickle.dumps(m.rows)), m.rows.in_order()):
        assert rows.is_in_order and torch.equal(run(m, rows)["y"], want)
    assert not Rows.by_id([1, 0], 2).is_in_order and Rows.by_id([1, 0], 2).in_order().is_in_order
    assert Rows.by_id([0, 2], 3).padded(4).in_order().spans() == [(0, 0, 1), (2, 1, 2)]
