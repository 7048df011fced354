"""`add_low_rank_multi_`: the low-rank half of many adapters, added in place."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import Adapter, AdapterStack, Rows
from lora_kernels.core import operands
from lora_kernels.ops.low_rank_multi import add_low_rank_multi_
from lora_kernels.testing.judge import against_plain

K, N, RANKS = 72, 56, (1, 3, 8, 13)
IDS = [0, -1, 3, 3, 1, 2, 2, -1, 0, 1, 0, 0] * 3
DTYPES = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16), (torch.bfloat16, torch.float32),
]  # fmt: skip


def adapters(dtype: torch.dtype = torch.float32) -> list[Adapter]:
    return [
        Adapter((torch.randn(R, K) * K**-0.5).to(dtype), (torch.randn(N, R) * R**-0.5).to(dtype), 0.5 + i)
        for i, R in enumerate(RANKS)
    ]


def expected(y: torch.Tensor, x: torch.Tensor, given: list[Adapter], dtype: torch.dtype) -> torch.Tensor:
    y = y.to(dtype, copy=True)
    for i, (a, b, scale, *_) in enumerate(given):
        mine = torch.tensor(IDS) == i
        y[mine] += scale * (x[mine].to(dtype) @ a.to(dtype).t() @ b.to(dtype).t())
    return y


@pytest.mark.parametrize(("dtype", "own"), DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_each_adapter_is_added_to_its_rows_and_to_no_other(backend, dtype, own, strided):
    given, x = adapters(own), torch.randn(len(IDS), K).to(dtype)
    large = torch.randn(len(IDS), N + 9).to(dtype)
    y = large[:, 4 : 4 + N]
    if strided:
        x, y = x.t().contiguous().t(), y.t().contiguous().t()
    before, around = y.clone(), large.clone()
    add_low_rank_multi_(y, x, AdapterStack(given), Rows.by_id(IDS, 4), backend=backend)
    exact, plain = (expected(before, x, given, each) for each in (torch.float64, torch.promote_types(dtype, own)))
    verdict = against_plain("y", y.double(), exact, plain.to(dtype).double())
    assert verdict.fault is None, verdict.fault
    base = torch.tensor(IDS) < 0
    assert torch.equal(y[base], before[base])
    around[:, 4 : 4 + N] = large[:, 4 : 4 + N]
    assert torch.equal(large, around)


def test_no_adapter_no_rows_and_no_row_add_nothing(backend):
    x, y = torch.randn(5, K), torch.randn(5, N)
    before, stack = y.clone(), AdapterStack(adapters())
    add_low_rank_multi_(y, x, [None] * 4, Rows.by_id([0, 1, 2, 3, -1], 4), backend=backend)
    add_low_rank_multi_(y, x, stack, Rows.by_id([-1] * 5, 2), backend=backend)
    add_low_rank_multi_(y[:0], x[:0], stack, Rows.by_id([], 4), backend=backend)
    assert torch.equal(y, before)


def test_no_gradient_is_recorded(backend):
    x, y = torch.randn(1, K, requires_grad=True), torch.zeros(1, N)
    add_low_rank_multi_(y, x, AdapterStack(adapters()), Rows.by_id([2], 4), backend=backend)
    assert not y.requires_grad
    assert y.any()


def one(a: tuple[int, int] = (4, K), b: tuple[int, int] = (N, 4), p: float = 0.0) -> list[operands.Adapter | None]:
    return [None, operands.Adapter(torch.zeros(a), torch.zeros(b), 1.0, p)]


@pytest.mark.parametrize(("x", "y", "given", "ids", "message"), [
    (torch.zeros(3, K), torch.zeros(2, N), one(), [0, 1, 1], r"got \(3, 72\) and \(2, 56\)"),
    (torch.zeros(3, K), torch.zeros(3, N), one(), [0, 1], r"does not fit x \(3, 72\) and 2 adapters"),
    (torch.zeros(2, K), torch.zeros(2, N), one(), [0, 2], r"does not fit x \(2, 72\) and 2 adapters"),
    (torch.zeros(2, K), torch.zeros(2, N).half(), one(), [0, 1], "got torch.float16 on cpu beside torch.float32"),
    (torch.zeros(2, K).double(), torch.zeros(2, N).double(), one(), [0, 1], "must have torch.float64"),
    (torch.zeros(2, K), torch.zeros(2, N), one(a=(4, K - 1)), [0, 1], r"A \[R, 72\] and B \[56, R\], got \(4, 71\)"),
    (torch.zeros(2, K), torch.zeros(2, N), one(b=(N, 5)), [0, 1], r"got \(4, 72\) and \(56, 5\)"),
    (torch.zeros(2, K), torch.zeros(2, N), one(p=0.1), [0, 1], "no dropout and share a dtype, got p=0.1"),
])  # fmt: skip
def test_operands_that_do_not_fit_are_refused(x, y, given, ids, message):
    with pytest.raises((TypeError, ValueError), match=message):
        add_low_rank_multi_(y, x, given, Rows.by_id(ids, max(ids) + 1))
