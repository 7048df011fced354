"""Everything that is known to observe operators sees ours, and a torch that has further observers fails a test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.observers import KNOWN, found
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import lora_linear
from lora_kernels.ops import registered
from lora_kernels.ops.watched import watched
from lora_kernels.testing.judge import Problem, problem

FORWARD = torch.ops.lora_kernels.forward.default


def layer(q: Problem) -> Callable[[Tensor], Tensor]:
    return lambda x: lora_linear(x, q.w, q.a, q.b, scale=0.5)


@pytest.fixture
def q() -> Problem:
    return problem(5, 24, 16, 4)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """A list that gets an entry for each call of the registered forward."""
    made: list[str] = []
    run = registered._forward_op
    monkeypatch.setattr(registered, "_forward_op", lambda *args: made.append("forward") or run(*args))
    return made


def test_torch_has_no_observer_that_nobody_has_looked_at():
    """The docstring of `support.observers` says what to do when this fails."""
    names = found()
    assert names.keys() == KNOWN.keys()
    new = {place: sorted(names[place] - set(KNOWN[place].split())) for place in KNOWN}
    assert not any(new.values()), f"torch {torch.__version__} has new names: {new}"


@pytest.mark.parametrize(
    "key",
    ["Functionalize", "FuncTorchDynamicLayerFrontMode", "FuncTorchVmapMode", "Python", "PythonTLSSnapshot",
     "PythonDispatcher", "PreDispatch", "AutocastCPU", "Negative"],
)  # fmt: skip
def test_any_key_that_the_dispatcher_includes_is_a_watcher(q, key):
    """A mode that a later torch adds would include a dispatch key of its own, as these modes do."""
    assert not watched(q.x, q.w, q.a, q.b, None)
    with torch._C._IncludeDispatchKeyGuard(getattr(torch._C.DispatchKey, key)):
        assert watched(q.x, q.w, q.a, q.b, None)
    assert not watched(q.x, q.w, q.a, q.b, None)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_grad_modes_are_no_watchers(q, calls, context):
    with context():
        layer(q)(q.x)
        assert not watched(q.x, q.w, q.a, q.b, q.bias)
    assert calls == []


def test_autocast_is_no_watcher(q, calls):
    with torch.autocast("cpu", torch.bfloat16):
        layer(q)(q.x)
    assert calls == []


def test_a_flop_counter_sees_the_operator(q, calls):
    with FlopCounterMode(display=False), torch.no_grad():
        layer(q)(q.x)
    assert calls == ["forward"]


def test_fake_tensors_see_the_operator(q, calls):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = layer(q)(mode.from_tensor(q.x))
    assert calls == ["forward"] and y.shape == (5, 24) and type(y).__name__ == "FakeTensor"


def test_functionalization_sees_the_operator(q, calls):
    with torch.no_grad():
        y = torch.func.functionalize(layer(q))(q.x)
        assert calls == ["forward"]
        assert torch.equal(y, layer(q)(q.x))


def test_compiled_graphs_hold_the_operator(q):
    targets: list[object] = []

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(layer(q), backend=backend, fullgraph=True)(q.x)
    assert FORWARD in targets


def test_saved_tensor_hooks_see_what_is_saved_without_the_operator(q, calls):
    """The autograd Function saves through ``save_for_backward``, whether or not the operator computes its result."""
    packed: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(tuple(t.shape)) or t, lambda t: t):
        lora_linear(q.x, q.w, q.a.requires_grad_(), q.b.requires_grad_(), scale=0.5)
    assert calls == [] and (5, 16) in packed and (5, 4) in packed


@pytest.mark.parametrize("make", [torch._neg_view, lambda t: torch._efficientzerotensor(t.shape)], ids=["neg", "zero"])
def test_tensors_without_their_value_in_memory_are_watched(q, make):
    assert watched(make(q.x), q.w, q.a, q.b, None)
    assert watched(q.x, q.w, q.a, q.b, make(q.bias))


def test_a_device_that_is_neither_a_cpu_nor_a_gpu_is_watched(q):
    x = q.x.to("meta")
    assert watched(x, x, x, x, None)
