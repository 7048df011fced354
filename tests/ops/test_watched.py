"""A call leaves out its registered operator only where nothing observes it, and its autograd Function only where no
gradient is wanted."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lora_kernels import dora_linear, lora_linear, quantize_weight
from lora_kernels.ops import linear, registered
from lora_kernels.testing.judge import check, problem

FORMS = ["dense", "nf4"]
FORWARD, BACKWARD = torch.ops.lora_kernels.forward.default, torch.ops.lora_kernels.backward.default


class Seen(TorchDispatchMode):
    """Records the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_kernels":
            self.ours.append(func)
        return func(*args, **(kwargs or {}))


class Named(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.ours: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (FORWARD, BACKWARD):
            self.ours.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=FORMS)
def operands(request):
    q = problem(5, 24, 16, 4)
    return q.x, q.w if request.param == "dense" else quantize_weight(q.w, "nf4"), q.a, q.b


def step(x: Tensor, w, a: Tensor, b: Tensor) -> Tensor:
    x, a, b = (t.detach().requires_grad_() for t in (x, a, b))
    y = lora_linear(x, w, a, b, scale=0.5)
    y.backward(torch.ones_like(y))
    return y.detach()


@pytest.fixture
def operators(monkeypatch):
    """A list that gets the name of the registered forward or backward at each of their calls."""
    calls: list[str] = []
    for name in ("_forward_op", "_backward_op"):
        run = getattr(registered, name)
        monkeypatch.setattr(registered, name, lambda *args, run=run, name=name: calls.append(name) or run(*args))
    return calls


def test_without_a_watcher_no_operator_is_called(operators, operands):
    step(*operands)
    lora_linear(*operands, scale=0.5)
    with torch.no_grad():
        lora_linear(*operands, scale=0.5)
    with torch.inference_mode():
        lora_linear(*operands, scale=0.5)
    assert operators == []


@pytest.mark.parametrize("mode", [Seen, Named])
def test_modes_see_the_operators(mode, operands):
    with mode() as seen:
        y = step(*operands)
    # A function mode sees the call ``y.backward()``, and is switched off inside it.
    assert seen.ours == ([FORWARD, BACKWARD] if mode is Seen else [FORWARD])
    with mode() as seen, torch.no_grad():
        assert torch.equal(lora_linear(*operands, scale=0.5), y)
    assert seen.ours == [FORWARD]


def test_a_mode_around_the_backward_alone_sees_it(operands):
    x, w, a, b = operands
    a = a.clone().requires_grad_()
    y = lora_linear(x, w, a, b, scale=0.5)
    with Seen() as seen:
        y.sum().backward()
    assert seen.ours == [BACKWARD]


def test_the_profiler_sees_the_operators(operands):
    with torch.profiler.profile() as profile:
        step(*operands)
    names = [event.name for event in profile.events()]
    assert names.count("lora_kernels::forward") == names.count("lora_kernels::backward") == 1


def test_a_checkpointing_policy_sees_the_operator(operands):
    x, w, a, b = operands
    x = x.clone().requires_grad_()
    asked = []

    def policy(ctx, op, *args, **kwargs):
        asked.append(op)
        return CheckpointPolicy.MUST_SAVE if op is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(x):
        return lora_linear(x.sin(), w, a, b, scale=0.5)

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    checkpoint(layer, x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert FORWARD in asked
    wanted = x.grad.clone()
    x.grad = None
    layer(x).sum().backward()
    assert torch.equal(x.grad, wanted)


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_traced_graphs_hold_the_operator(tracing):
    q = problem(5, 24, 16, 4)

    def run(x):
        return lora_linear(x, q.w, q.a, q.b, scale=0.5)

    with torch.no_grad():
        graph = make_fx(run, None, tracing, _allow_non_fake_inputs=True)(q.x)
    assert FORWARD in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(q.x), run(q.x))


def test_subclasses_of_tensor_see_the_operator():
    class Mine(Tensor):
        ours: list[object] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is FORWARD:
                cls.ours.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    q = problem(5, 24, 16, 4)
    with torch.no_grad():
        lora_linear(q.x, q.w, q.a, q.b.as_subclass(Mine), scale=0.5)
        lora_linear(q.x, q.w, q.a, q.b, bias=torch.zeros(24).as_subclass(Mine), scale=0.5)
    assert len(Mine.ours) == 2


@pytest.mark.parametrize("which", ["x", "w", "a", "b", "bias"])
def test_a_lazily_negated_operand_is_taken_at_its_value(which):
    """The memory of such a tensor holds the other sign. torch's dispatcher negates it before an operator reads it."""
    q = problem(5, 24, 16, 4)
    given = {"x": q.x, "w": q.w, "a": q.a, "b": q.b, "bias": q.bias}
    negative = given | {which: -given[which]}
    given[which] = torch._neg_view(given[which])

    def run(x, w, a, b, bias):
        return lora_linear(x, w, a, b, bias=bias, scale=0.5)

    with torch.no_grad():
        assert torch.equal(run(**given), run(**negative))


def test_the_function_is_left_out_where_nothing_wants_a_gradient(monkeypatch):
    q, applied = problem(5, 24, 16, 4), []
    apply = linear.apply
    monkeypatch.setattr(linear, "apply", lambda *args: applied.append(1) or apply(*args))
    operands = {"x": q.x, "lora_a": q.a, "lora_b": q.b, "bias": q.bias, "scale": torch.tensor(0.5)}
    y = lora_linear(weight=q.w, **operands)
    assert not applied and not y.requires_grad
    check({"y": lora_linear(weight=q.w, **operands | {"scale": q.scale})}, q)
    for name in operands:
        wanted = operands | {name: operands[name].clone().requires_grad_()}
        assert lora_linear(weight=q.w, **wanted).requires_grad, name
    assert len(applied) == len(operands)


def test_a_parameter_that_begins_to_want_gradients_gets_them():
    q = problem(5, 24, 16, 4)
    a = nn.Parameter(q.a, requires_grad=False)
    assert not lora_linear(q.x, q.w, a, q.b, scale=0.5).requires_grad
    a.requires_grad_()
    lora_linear(q.x, q.w, a, q.b, scale=0.5).sum().backward()
    assert a.grad is not None and a.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_tensor_that_has_outlived_a_transform_is_served(grad, name):
    q, kept = problem(5, 24, 16, 4), []
    operands = {"x": q.x, "weight": q.w, "lora_a": q.a, "lora_b": q.b, "bias": q.bias}
    torch.func.grad(lambda t: (kept.append(t.detach()), t.sum())[1])(operands[name])
    wanted = "lora_b" if name == "lora_a" else "lora_a"
    operands |= {name: kept[0], wanted: operands[wanted].clone().requires_grad_(grad)}
    y = lora_linear(scale=q.scale, **operands)
    check({"y": y.detach()}, q)
    assert y.requires_grad == grad
    norm = torch.linalg.vector_norm(q.w.double() + q.scale * q.b.double() @ q.a.double(), dim=1).float()
    with torch.set_grad_enabled(grad):  # with the norm as its magnitude, DoRA is plain LoRA
        torch.testing.assert_close(dora_linear(scale=q.scale, magnitude=norm, **operands), y)


def test_torch_wraps_a_function_in_nothing_but_what_is_left_out():
    """`lora_kernels.ops.autograd.apply` leaves out the Python of ``Function.apply``. A torch whose ``apply`` calls
    something else in an ordinary call fails here: then find out what it is for, and when `apply` must not leave it
    out. torch 2.14 has moved that Python into C."""
    entered = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

    x = torch.ones(2, requires_grad=True)

    def record(frame, event, _):
        if event == "call":
            entered.append(frame.f_code.co_name)

    sys.setprofile(record)
    try:
        Identity.apply(x)
    finally:
        sys.setprofile(None)
    known = {"apply", "_is_setup_context_defined", "unwrap_dead_wrappers", "<genexpr>", "forward"}
    assert {"forward"} <= set(entered) <= known
