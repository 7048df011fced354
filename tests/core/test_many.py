"""An `AdapterStack` lays its adapters out once, and each of its versions keeps what it holds."""

from __future__ import annotations

import functools
import sys
import threading

import pytest
import torch

from lora_kernels import Adapter, AdapterStack, Rows, lora_linear_multi
from lora_kernels.core import operands
from lora_kernels.core.many import panel_stride, stored


def adapter(R: int = 2, K: int = 6, N: int = 4, dtype: torch.dtype = torch.float32, **kwargs) -> Adapter:
    return Adapter(torch.randn(R, K).to(dtype), torch.randn(N, R).to(dtype), kwargs.pop("scale", 0.5), **kwargs)


def own(R: int = 2, K: int = 6, N: int = 4, scale: float = 0.5) -> operands.Adapter:
    return stored(torch.randn(R, K), torch.randn(N, R), scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("R", "K", "N"), [(1, 1, 1), (3, 130, 65), (8, 64, 2048), (256, 31, 16)])
def test_rows_of_a_and_of_b_transposed_lie_with_an_odd_number_of_cache_lines_between_them(R, K, N, dtype):
    given = adapter(R, K, N, dtype)
    a, b, scale, p, seed = stored(given.lora_a.requires_grad_(), given.lora_b, 2)
    assert torch.equal(a, given.lora_a) and torch.equal(b, given.lora_b) and (scale, p, seed) == (2.0, 0.0, None)
    assert not a.requires_grad and a.data_ptr() != given.lora_a.data_ptr()
    assert a.stride(1) == 1 and b.stride(0) == 1
    for stride, cols in ((a.stride(0), K), (b.stride(1), N)):
        assert stride == panel_stride(cols, dtype) >= cols
        assert stride * dtype.itemsize % 64 == 0 and stride * dtype.itemsize // 64 % 2 == 1
        assert stride - cols < 2 * 64 // dtype.itemsize


def test_a_stack_made_in_inference_mode_serves_gradients_of_x_later():
    with torch.inference_mode():
        stack = AdapterStack([adapter()])
    x = torch.randn(3, 6, requires_grad=True)
    lora_linear_multi(x, torch.randn(4, 6), stack, Rows.by_id([0, 0, -1], 1)).sum().backward()
    assert x.grad is not None


def test_a_stack_is_a_sequence_of_what_it_holds():
    stack = AdapterStack([adapter(3), None, adapter(1)._replace(scale=torch.tensor(2.0))])
    assert len(stack) == 3 and stack[1] is None and list(stack) == list(stack.slots)
    assert [each.a.shape[0] for each in stack[::2]] == [3, 1] and stack[2].scale == 2.0
    assert stack.largest is stack[0] and stack.facts == (6, 4, torch.float32, torch.device("cpu"))
    assert repr(stack) == "AdapterStack(3 places, 2 adapters, ranks [3, 1])"
    empty = AdapterStack([None, None])
    assert empty.largest is None and empty.facts is None and len(empty) == 2


def test_replacing_makes_a_new_version_and_leaves_the_old_one_as_it_was():
    stack = AdapterStack([adapter(3), None])
    stack.native = "derived"
    before, slots, version = stack.snapshot(), stack.slots, stack.version
    assert before.native == "derived"
    other = own(5)
    stack.replace({1: other}, size=4)
    assert stack.slots == (slots[0], other, None, None) and stack.largest is other
    assert stack.version == version + 1 and stack.native is None
    assert before.slots is slots and before.version == version and before.native == "derived"
    stack.replace({0: None, 1: None})
    assert stack.largest is None


def test_what_is_derived_from_an_old_version_is_not_taken_for_the_new_one():
    """A back-end that has read one version sets `native` after another thread has replaced an adapter."""
    stack = AdapterStack([adapter()])
    call = stack.snapshot()
    stack.replace({0: own(7)})
    call.native = "of the old adapters"
    assert stack.native is None and stack.snapshot().native is None


def test_a_stack_that_refuses_is_as_it_was():
    stack = AdapterStack([adapter(3), adapter(2)])
    slots, version = stack.slots, stack.version
    for changed, size, error, words in (
        ({1: own(K=7)}, None, ValueError, r"must share K, N, dtype and device, got 6, 4, torch.float32, cpu; 7, 4"),
        ({0: own(N=9), 1: own()}, None, ValueError, "must share"),
        ({2: own()}, None, IndexError, r"places 0\.\.1, got 2: pass size"),
        ({-1: own()}, None, IndexError, r"got -1"),
        ({0: adapter()}, None, TypeError, "what `stored` makes, or None, got a Adapter"),
        ({}, 1, ValueError, "a stack of 2 places cannot shrink to 1"),
        ({0: own()._replace(b=torch.zeros(4, 2).half())}, None, TypeError, "in one dtype, got torch.float32 and"),
    ):
        with pytest.raises(error, match=words):
            stack.replace(changed, size)
        assert stack.slots is slots and stack.version == version


def test_all_adapters_may_be_replaced_by_those_of_another_layer():
    stack = AdapterStack([adapter(3), adapter(2)])
    stack.replace({0: own(K=9), 1: own(K=9)})
    assert stack.facts == (9, 4, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (adapter(dropout_p=0.1), ValueError, r"adapter 1 has dropout, p = 0.1: pass a list of adapters instead"),
        (adapter(bias=torch.zeros(4)), ValueError, "adapter 1 has a bias of its own"),
        (adapter(scale=float("nan")), ValueError, "the scale of adapter 1 must be finite, got nan"),
        (
            adapter()._replace(lora_a=torch.zeros(3, 6)),
            ValueError,
            r"A \[R, K\] and B \[N, R\], got \(3, 6\) and \(4, 2\)",
        ),
        (adapter()._replace(lora_a=torch.zeros(6)), ValueError, r"got \(6,\)"),
        (adapter(0), ValueError, r"got \(0, 6\)"),
        (adapter()._replace(lora_b=torch.zeros(4, 2).half()), TypeError, "one floating dtype, got torch.float32 and"),
        (adapter(dtype=torch.int32), TypeError, "one floating dtype, got torch.int32"),
        ((torch.zeros(2, 6), torch.zeros(4, 2), 1.0), TypeError, "must be a lora_kernels.Adapter or None, got a tuple"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_what_a_stack_cannot_serve_is_refused_with_its_number(given, error, words):
    with pytest.raises(error, match=words):
        AdapterStack([adapter(), given])


def test_a_stack_may_be_replaced_while_others_read_it(request):
    stack, stop, torn = AdapterStack([own(1), own(1)]), threading.Event(), []
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-5)  # the threads take turns within a replacement, and none waits for another's 5 ms

    def read():
        while not stop.is_set():
            call = stack.snapshot()
            first, second = call.slots
            if first.a.shape != second.a.shape or call.largest.a.shape != first.a.shape or call[1] is not second:
                torn.append(call.version)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for R in range(1, 100):
        stack.replace({0: own(R % 5 + 1), 1: own(R % 5 + 1)})
    stop.set()
    for thread in threads:
        thread.join()
    assert not torn and stack.version == 100
