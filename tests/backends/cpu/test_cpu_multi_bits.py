"""What belongs to an adapter has the same bits whoever else is in the batch, wherever its rows stand, and on any number
of threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels were not built on this machine")
from support.native_multi import RANKS, Batch, random_ids  # noqa: E402

from lora_kernels.backends import cpu  # noqa: E402
from lora_kernels.core.many import AdapterStack  # noqa: E402
from lora_kernels.core.operands import Base  # noqa: E402

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]
Ranks = Sequence[int | None]
MANY: Ranks = [RANKS[i % 6] for i in range(32)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def batch(
    ids: Tensor, dtype: torch.dtype, adapter_dtype: torch.dtype, p: float, stack: bool = False, ranks: Ranks = MANY
) -> Batch:
    """Return a batch whose base product is zero, since the bits of a base GEMM may depend on the number of rows."""
    q = Batch(ids, ranks, 70, 1100, dtype, adapter_dtype, p, bias=False, stack=stack)
    q.w.zero_()
    return q


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(t, u) for t, u in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "stack"),
    [(*DTYPES[0], False), (*DTYPES[0], True), (*DTYPES[1], False), (*DTYPES[1], True), (*DTYPES[2], False)],
)
def test_an_adapter_has_the_same_bits_alone_and_among_31_others(
    isa: str, dtype: torch.dtype, adapter_dtype: torch.dtype, stack: bool
) -> None:
    """The counts are few rows, one tile and several; the rows follow each other alone, and are scattered among the
    others."""
    p = 0.0 if stack else 0.2
    counts = [(4, 1, 70, 3, 20, 7)[i // 6 % 6] for i in range(32)]
    torch.set_num_threads(1)
    q = batch(random_ids((*counts, 30)), dtype, adapter_dtype, p, stack)
    among = q.run()
    for i in (0, 5, 8, 16, 29):
        ranks = [R if j == i else None for j, R in enumerate(MANY)]
        only = batch(torch.full((counts[i],), i), dtype, adapter_dtype, p, stack, ranks)
        assert same(only.own_half(only.run(), i), q.own_half(among, i)), f"adapter {i} of rank {MANY[i]}"


@pytest.mark.parametrize("order", ["sorted", "interleaved"])
def test_positions_in_the_batch_change_no_bit(order: str) -> None:
    counts = [(64, 5, 1)[i % 3] for i in range(32)]
    torch.set_num_threads(1)
    ids = random_ids((*counts, 0))
    q = batch(ids, torch.float32, torch.float32, 0.1)
    got = q.run()
    if order == "interleaved":  # the rows of the first adapter are evenly spaced
        others = ids[ids != 0].tolist()
        other = torch.tensor([others.pop() if m % 3 or m >= 192 else 0 for m in range(len(ids))])
    else:
        other = ids.sort().values
    moved = batch(other, torch.float32, torch.float32, 0.1)
    again = moved.run()
    for i in range(32):
        assert same(q.own_half(got, i), moved.own_half(again, i)), f"adapter {i}"


@pytest.mark.parametrize("counts", [[6] * 32, [300, *[2] * 31]])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES[:2])
def test_threads_and_repetition_change_no_bit(
    dtype: torch.dtype, adapter_dtype: torch.dtype, counts: list[int]
) -> None:
    """A large adapter is computed by all threads together, and small ones by one thread each."""
    q = batch(random_ids((*counts, 9)), dtype, adapter_dtype, 0.1)
    torch.set_num_threads(1)
    first = q.run()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again = q.run()
        assert torch.equal(first.y, again.y) and torch.equal(first.dx, again.dx)  # type: ignore[arg-type]
        for i in range(32):
            assert same(q.own_half(first, i), q.own_half(again, i)), f"adapter {i}, {threads} threads"


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [DTYPES[0], DTYPES[1], DTYPES[3]])
def test_a_stack_has_the_bits_of_a_list_of_its_adapters(
    isa: str, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> None:
    q = batch(random_ids((*[(1, 3, 9)[i % 3] for i in range(32)], 4)), dtype, adapter_dtype, 0.0, stack=True)
    stacked = q.run()
    assert isinstance(q.adapters, AdapterStack)
    q.adapters = list(q.adapters)
    listed = q.run()
    assert torch.equal(stacked.y, listed.y) and torch.equal(stacked.dx, listed.dx)  # type: ignore[arg-type]


def test_saving_h_changes_no_bit_of_y(isa: str) -> None:
    q = batch(random_ids((*[(1, 3, 9)[i % 3] for i in range(32)], 4)), torch.bfloat16, torch.bfloat16, 0.3)
    assert torch.equal(q.run().y, q.run(save_h=False).y)


def test_a_replaced_adapter_is_used_by_the_next_call() -> None:
    q = Batch(torch.tensor([0, 1, 1]), (8, 8), stack=True, bias=False)
    before = q.run(save_h=False).y
    first, second = q.adapters
    q.adapters.replace({0: second, 1: first})
    after, _ = cpu.forward_multi(q.x, Base(q.w), list(q.adapters), q.rows, False)
    got = q.run(save_h=False).y
    assert torch.equal(got, after) and not torch.equal(got, before)
