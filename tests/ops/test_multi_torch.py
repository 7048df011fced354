"""Many adapters under autocast, activation checkpointing, and what observes operators."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from support import judging
from support.many import equal, gradients, leaves, mixed, run
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lora_kernels import AdapterStack, lora_linear_multi, quantize_weight
from lora_kernels.ops import registered_multi

pytestmark = pytest.mark.usefixtures("one_thread")

FORWARD = torch.ops.lora_kernels.forward_multi.default
BACKWARD = torch.ops.lora_kernels.backward_multi.default


@pytest.fixture(autouse=True)
def _no_warnings_of_eager():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no kernel is chosen")
        yield


def test_x_and_the_sum_of_rows_times_ranks_are_saved():
    m = mixed(64, 40, 24, (4, 8, 16), bias=False)
    x, adapters, _ = leaves(m)
    adapters = [each._replace(lora_a=nn.Parameter(each.lora_a), lora_b=nn.Parameter(each.lora_b)) for each in adapters]
    w = nn.Parameter(m.w, requires_grad=False)
    rows = m.rows
    of_h = sum(count * each.lora_a.shape[0] for count, each in zip(rows.counts, adapters, strict=True))
    saved = judging.saved_bytes(lambda: lora_linear_multi(x, w, adapters, rows, backend="eager"))
    assert saved == 4 * (64 * 24 + of_h)
    frozen_a = [each._replace(lora_a=each.lora_a.detach()) for each in adapters]
    of_a = 4 * 24 * sum(each.lora_a.shape[0] for each in adapters)
    saved = judging.saved_bytes(lambda: lora_linear_multi(x, w, frozen_a, rows, backend="eager"))
    assert saved == 4 * of_h + of_a


def test_autocast_saves_x_once_in_its_dtype_and_no_copy_of_w():
    m = mixed(64, 40, 24, (4, 8), bias=False)
    x, adapters, _ = leaves(m)
    adapters = [each._replace(lora_a=nn.Parameter(each.lora_a), lora_b=nn.Parameter(each.lora_b)) for each in adapters]
    w, rows = nn.Parameter(m.w, requires_grad=False), m.rows
    of_h = sum(count * each.lora_a.shape[0] for count, each in zip(rows.counts, adapters, strict=True))

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return lora_linear_multi(x, w, adapters, rows)

    assert judging.saved_bytes(call) == 2 * 64 * 24 + 4 * of_h  # fp32 adapters have an h in fp32
    y = call()
    y.backward(m.dy.bfloat16())
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    cast = replace(m, x=m.x.bfloat16(), w=m.w.bfloat16(), dy=m.dy.bfloat16())
    want = run(cast)
    assert torch.equal(y, want.y) and torch.equal(x.grad, want.dx.float())
    assert all(torch.equal(each.lora_a.grad, da) for each, da in zip(adapters, want.da, strict=True))


def test_autocast_converts_adapters_in_16_bits_and_leaves_fp64_alone():
    m = mixed(20, 12, 8, (2, 3))
    half = [each._replace(lora_a=each.lora_a.half(), lora_b=each.lora_b.half()) for each in m.adapters]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear_multi(m.x, m.w, half, m.rows)
        wide = mixed(20, 12, 8, (2, 3), dtype=torch.float64)
        assert lora_linear_multi(wide.x, wide.w, wide.adapters, wide.rows).dtype == torch.float64
    both = [each._replace(lora_a=each.lora_a.bfloat16(), lora_b=each.lora_b.bfloat16()) for each in half]
    assert torch.equal(y, lora_linear_multi(m.x.bfloat16(), m.w.bfloat16(), both, m.rows))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_drawn_seeds(reentrant):
    m = mixed(30, 12, 8, (2, 3, 4), p=0.5)
    m = replace(m, adapters=[each._replace(seed=None) for each in m.adapters])
    results = []
    for kept in (False, True):
        x, adapters, wanted = leaves(m)

        def layer(x, adapters=adapters):
            return lora_linear_multi(x.sin(), m.w, adapters, m.rows, bias=m.bias)

        torch.manual_seed(4)
        y = checkpoint(layer, x, use_reentrant=reentrant) if kept else layer(x)
        y.backward(m.dy)
        results.append([y.detach(), *(t.grad for t in wanted)])
    assert equal(*results)


def test_a_checkpointing_policy_sees_the_operator():
    m = mixed(30, 12, 8, (2, 3))
    x, adapters, wanted = leaves(m)
    asked = []

    def policy(ctx, op, *args, **kwargs):
        asked.append(op)
        return CheckpointPolicy.MUST_SAVE if op is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(x):
        return lora_linear_multi(x.sin(), m.w, adapters, m.rows)

    y = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    assert FORWARD in asked and equal(gradients(y, wanted, m.dy), gradients(layer(x), wanted, m.dy))


class Seen(TorchDispatchMode):
    """Records the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_kernels":
            self.ours.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operators(monkeypatch) -> list[str]:
    """A list that gets the name of the registered operator at each of its calls."""
    calls: list[str] = []
    for name in ("_forward_op", "_backward_op"):
        inner = getattr(registered_multi, name)
        monkeypatch.setattr(
            registered_multi, name, lambda *args, inner=inner, name=name: calls.append(name) or inner(*args)
        )
    return calls


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_operators_are_called_where_something_observes_them_only(operators, format):
    m = mixed(30, 12, 8, (2, None, 4), p=0.3)
    m = m if format == "dense" else replace(m, w=quantize_weight(m.w, "nf4"))
    want = run(m)
    with torch.no_grad():
        y = lora_linear_multi(m.x, m.w, m.adapters, m.rows, bias=m.bias)
    assert operators == []
    with Seen() as seen:
        got = run(m)
    assert seen.ours == [FORWARD, BACKWARD]
    assert equal(got.tensors(), want.tensors()) and torch.equal(got.y, y)
    assert got.da[0] is not None and got.da[1] is None
    with Seen() as seen, torch.no_grad():
        stack = AdapterStack([each and each._replace(dropout_p=0.0) for each in m.adapters])
        lora_linear_multi(m.x, m.w, stack, m.rows)
    assert seen.ours == [FORWARD]
    with torch.profiler.profile() as profile:
        run(m)
    names = [event.name for event in profile.events()]
    assert names.count("lora_kernels::forward_multi") == names.count("lora_kernels::backward_multi") == 1


@pytest.mark.parametrize("place", ["x", "w", "a", "b", "bias"])
def test_lazily_negated_operands_and_subclasses_go_through_the_operator(operators, place):
    class Kind(Tensor):
        pass

    m = mixed(30, 12, 8, (2, 3))
    given = {"x": m.x, "w": m.w, "a": m.adapters[1].lora_a, "b": m.adapters[1].lora_b, "bias": m.bias}

    def call(x, w, a, b, bias):
        with torch.no_grad():
            return lora_linear_multi(
                x, w, [m.adapters[0], m.adapters[1]._replace(lora_a=a, lora_b=b)], m.rows, bias=bias
            )

    want = call(**given | {place: -given[place]})
    assert operators == []
    assert torch.equal(call(**given | {place: torch._neg_view(given[place])}), want) and operators == ["_forward_op"]
    call(**given | {place: given[place].as_subclass(Kind)})
    assert operators == ["_forward_op"] * 2


def test_a_tensor_that_has_outlived_a_transform_is_served():
    m, kept = mixed(30, 12, 8, (2, 3)), []
    torch.func.grad(lambda t: (kept.append(t.detach()), t.sum())[1])(m.adapters[1].lora_a)
    outlived = [m.adapters[0], m.adapters[1]._replace(lora_a=kept[0])]
    want = lora_linear_multi(m.x, m.w, m.adapters, m.rows)
    assert torch.equal(lora_linear_multi(m.x, m.w, outlived, m.rows), want)


@pytest.mark.parametrize(("format", "p"), [("dense", 0.2), ("nf4", 0.0)])
def test_the_operators_pass_opcheck(format, p):
    m = mixed(9, 6, 4, (2, 3), p=p)
    w, last = m.w, ()
    if format == "nf4":
        q = quantize_weight(m.w, "nf4")
        w, last = q.codes, (list(q.tensors[1:]), "nf4", q.blocksize)
    a, b, scale, rates, seeds, _ = (list(column) for column in zip(*m.adapters, strict=True))
    a, b, scale, rates, seeds = [*a, None], [*b, None], [*scale, 1.0], [*rates, 0.0], [*seeds, None]
    rows = m.rows.padded(3)
    columns = a, b, scale, rates, seeds, rows.order, rows.starts, None
    forward = (m.x, w, m.bias, *columns, True, *last)
    torch.library.opcheck(FORWARD, forward)
    _, h = FORWARD(*forward)
    backward = (m.dy, m.x, w, h, *columns, True, [True, False, True], [True, True, False], *last)
    torch.library.opcheck(BACKWARD, backward)


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_graphs_of_make_fx_hold_the_operator(tracing):
    m = mixed(9, 6, 4, (2, 3))
    rows = m.rows

    def call(x):
        return lora_linear_multi(x, m.w, m.adapters, rows)

    with torch.no_grad():
        graph = make_fx(call, None, tracing, _allow_non_fake_inputs=True)(m.x)
    assert FORWARD in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(m.x), call(m.x))
