"""Many adapters from a stack, in threads, in inference mode and on the meta device."""

from __future__ import annotations

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import many
from support.many import equal, leaves, mixed, run

from lora_kernels import AdapterStack, Rows, lora_linear_multi
from lora_kernels.backends import eager
from lora_kernels.testing import judge

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_warnings_of_eager():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no kernel is chosen")
        yield


def test_a_stack_that_is_replaced_during_a_call_does_not_change_what_the_call_reads(monkeypatch):
    m = mixed(12, 12, 8, (2, 3))
    stack, inner = AdapterStack(m.adapters), eager.forward_multi
    want = many.served(m, backend="eager")

    def replaced(x, base, adapters, rows, save_h):
        adapters.native = "derived"
        assert stack.native == "derived"
        stack.replace({0: None, 1: None})
        assert adapters.native == "derived" and stack.native is None
        return inner(x, base, adapters, rows, save_h)

    monkeypatch.setattr(eager, "forward_multi", replaced)
    with torch.no_grad():
        assert torch.equal(lora_linear_multi(m.x, m.w, stack, m.rows, bias=m.bias, backend="eager"), want)
    assert stack.slots == (None, None)


def test_a_stack_gives_dx():
    m = mixed(12, 12, 8, (2, 3))
    x = m.x.clone().requires_grad_()
    lora_linear_multi(x, m.w, AdapterStack(m.adapters), m.rows).backward(m.dy)
    for i in range(2):
        judge.check({"dx": x.grad[m.of(i)]}, many.problem_of(m, i))


def test_a_call_does_not_go_through_the_places_of_a_stack(monkeypatch):
    """A stack of 1,000 places of which 2 are taken must cost what a stack of 2 costs."""
    m = mixed(12, 12, 8, (2, 3))
    stack, want = AdapterStack([*m.adapters, *[None] * 998]), many.served(m, backend="eager")

    def through(self):
        raise AssertionError("the places of the stack were visited one by one")

    monkeypatch.setattr(AdapterStack, "__iter__", through)
    rows = Rows.by_id(m.ids, 1000)
    with torch.no_grad():
        assert torch.equal(lora_linear_multi(m.x, m.w, stack, rows, bias=m.bias, backend="eager"), want)


def test_rows_made_in_inference_mode_serve_training():
    m = mixed(12, 12, 8, (2, 3), p=0.2)
    with torch.inference_mode():
        rows = m.rows
        lora_linear_multi(m.x, m.w, m.adapters, rows.padded(2), bias=m.bias)
    assert equal(run(m, rows).tensors(), run(m).tensors())


def test_the_meta_device_gives_shapes():
    m = mixed(12, 12, 8, (2, 3), p=0.2)
    x, w, bias, dy = (t.to("meta") for t in (m.x, m.w, m.bias, m.dy))
    adapters = [
        each._replace(
            lora_a=each.lora_a.to("meta").requires_grad_(), lora_b=each.lora_b.to("meta").requires_grad_(), seed=None
        )
        for each in m.adapters
    ]
    y = lora_linear_multi(x, w, adapters, m.rows, bias=bias)
    y.backward(dy)
    assert y.shape == (12, 12) and adapters[0].lora_a.grad.shape == (2, 8) and adapters[1].lora_b.grad.shape == (12, 3)


def test_threads_may_share_rows_and_a_stack():
    m = mixed(64, 12, 8, (2, 3, 4))
    stack, rows, want = AdapterStack(m.adapters), m.rows, many.served(m)
    wanted = run(m).tensors()

    def call(_):
        with torch.no_grad():
            y = lora_linear_multi(m.x, m.w, stack, rows, bias=m.bias)
        return torch.equal(y, want) and equal(run(m, rows).tensors(), wanted)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(24)))


@pytest.mark.parametrize("kind", ["list", "stack", "training"])
def test_a_call_enters_as_many_functions_for_32_adapters_as_for_one(kind):
    """The Python of a small layer takes longer than its arithmetic. What a back-end enters is not counted."""

    def entered(n: int) -> int:
        m = mixed(32, 12, 8, (4,) * n, ids=torch.arange(32) % n)
        _, adapters, _ = leaves(m)
        given = AdapterStack(m.adapters) if kind == "stack" else adapters
        rows, count = m.rows, 0

        def record(frame, event, _):
            nonlocal count
            file = frame.f_code.co_filename
            count += event == "call" and "lora_kernels" in file and "backends" not in file

        def call():
            with torch.set_grad_enabled(kind == "training"):
                y = lora_linear_multi(m.x, m.w, given, rows, bias=m.bias)
            if kind == "training":
                y.backward(m.dy)

        call()
        call()
        sys.setprofile(record)
        try:
            call()
        finally:
            sys.setprofile(None)
        return count

    assert 0 < entered(32) == entered(1) < 90
