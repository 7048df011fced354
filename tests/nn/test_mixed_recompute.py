"""A backward that computes a layer again computes it in the context of its first forward, or raises."""

from __future__ import annotations

import contextvars
import gc
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.nn import recompute
from lora_kernels.nn.in_force import current_for
from lora_kernels.nn.mixed import mixed


class Layer(nn.Module):
    """y = x · w for rows of the base, and x · w · (2 + number) for rows of an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((4,), 3.0))

    @staticmethod
    def adapter_table(model: nn.Module) -> dict[str, int]:
        return {"a": 0, "b": 1}

    def forward(self, x: Tensor) -> Tensor:
        context = current_for(self)
        factor = 1.0 if context is None else 2.0 + context.rows.counts.index(1)
        y = (x * self.w * factor) ** 2  # saves what it has computed, so that a backward reads the second forward
        return y if context is None else context.computed(self, y)


kinds = pytest.mark.parametrize("reentrant", [False, True])


@pytest.fixture(autouse=True)
def nothing_is_remembered_from_other_tests():
    gc.collect()
    recompute._forwards.clear()


def loss_of(layer: Layer, reentrant: bool) -> Tensor:
    x = torch.ones(1, 4, requires_grad=True)
    return checkpoint(layer, x, use_reentrant=reentrant).sum()


def grad_of(layer: Layer) -> float:
    grad, layer.w.grad = layer.w.grad, None
    return grad[0].item()


@kinds
def test_a_backward_inside_the_context_gives_the_gradients_of_its_rows(reentrant):
    layer = Layer()
    with mixed(layer, ["b"]):
        loss_of(layer, reentrant).backward()
    assert grad_of(layer) == 2 * 3.0 * 3.0**2


@kinds
def test_a_backward_outside_of_the_context_raises(reentrant):
    layer = Layer()
    with mixed(layer, ["b"]):
        loss = loss_of(layer, reentrant)
    with pytest.raises(RuntimeError, match="inside the same"):
        loss.backward()


@kinds
def test_a_backward_inside_another_context_raises(reentrant):
    layer = Layer()
    with mixed(layer, ["b"]):
        loss = loss_of(layer, reentrant)
    with mixed(layer, ["a"]), pytest.raises(RuntimeError, match="inside the same"):
        loss.backward()


@kinds
def test_a_backward_inside_a_context_of_a_forward_without_one_raises(reentrant):
    layer = Layer()
    loss = loss_of(layer, reentrant)
    with mixed(layer, ["a"]), pytest.raises(RuntimeError, match="or both outside"):
        loss.backward()


@kinds
def test_a_function_that_is_computed_again_may_enter_a_context_of_its_own(reentrant):
    layer = Layer()

    def function(x: Tensor) -> Tensor:
        with mixed(layer, ["b"]):
            return layer(x)

    x = torch.ones(1, 4, requires_grad=True)
    for _ in range(2):
        (checkpoint(function, x, use_reentrant=reentrant).sum() + loss_of(Layer(), reentrant)).backward()
        assert grad_of(layer) == 2 * 3.0 * 3.0**2


def test_the_losses_of_two_contexts_cannot_share_a_backward():
    layer = Layer()
    with mixed(layer, ["b"]):
        first = loss_of(layer, False)
    with mixed(layer, ["a"]):
        second = loss_of(layer, False)
        with pytest.raises(RuntimeError, match="inside the same"):
            (first + second).backward()


@kinds
def test_training_goes_on_without_a_context_and_in_other_contexts(reentrant):
    layer, kept = Layer(), []
    for names, factor in ((["b"], 3.0), (["a"], 2.0), (["b"], 3.0)):
        with mixed(layer, names):
            kept.append(loss_of(layer, reentrant))  # a loss that is kept does not disturb the next context
            kept[-1].backward()
        assert grad_of(layer) == 2 * 3.0 * factor**2
    loss_of(layer, reentrant).backward()
    assert grad_of(layer) == 2 * 3.0


@kinds
def test_two_forwards_of_one_context_share_a_backward(reentrant):
    layer = Layer()
    with mixed(layer, ["b"]):
        (loss_of(layer, reentrant) + loss_of(layer, reentrant)).backward()
    assert grad_of(layer) == 2 * 2 * 3.0 * 3.0**2


@kinds
def test_a_forward_that_no_backward_follows_does_not_disturb_later_training(reentrant):
    layer = Layer()
    with mixed(layer, ["b"]):
        loss_of(layer, reentrant)
        with torch.no_grad():
            layer(torch.ones(1, 4))
    loss_of(layer, reentrant).backward()
    assert grad_of(layer) == 2 * 3.0
    layer(torch.ones(1, 4))
    assert not recompute.REMEMBERED


def test_a_forward_for_inference_is_not_remembered():
    layer = Layer().eval()
    with mixed(layer, ["b"]), torch.no_grad():
        layer(torch.ones(1, 4))
    assert not recompute.REMEMBERED


def test_a_layer_that_is_freed_is_forgotten():
    layer = Layer()
    with mixed(layer, ["b"]):
        loss = loss_of(layer, False)
    assert recompute.REMEMBERED
    del loss, layer
    gc.collect()
    assert not recompute.REMEMBERED


def test_a_thread_of_autograd_sees_the_context_of_the_thread_that_called_backward(monkeypatch):
    """On a GPU autograd calls a layer again in a thread of its own, to which torch hands the caller's variables."""
    layer, found = Layer(), []

    def in_a_thread(variables: contextvars.Context | None) -> None:
        if variables is not None:
            torch._C._stash_obj_in_tls("context", variables)
        found.append(current_for(layer))
        if variables is not None:
            torch._C._remove_obj_from_tls("context")

    with mixed(layer, ["b"]) as context:
        loss = loss_of(layer, False)
        monkeypatch.setattr(recompute, "in_backward", lambda: True)
        variables = contextvars.copy_context() if hasattr(torch._C, "_remove_obj_from_tls") else None
        thread = threading.Thread(target=in_a_thread, args=(variables,))
        thread.start()
        thread.join()
    assert found == ([context] if variables else [])  # an older torch hands nothing, and the layer has raised
    del loss
