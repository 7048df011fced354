"""Many adapters in one call of the CPU back-end, with every instruction set: each adapter is judged over its own rows,
as a layer with this adapter alone."""

from __future__ import annotations

import pytest
import torch
from support.fences import fences
from support.judging import DTYPES

_C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels were not built on this machine")
from support.native_multi import RANKS, Batch, random_ids, without_rank  # noqa: E402

from lora_kernels.backends import cpu, eager  # noqa: E402
from lora_kernels.core.operands import Adapter, Base, Needs  # noqa: E402
from lora_kernels.core.rows import Rows  # noqa: E402
from lora_kernels.quant.weight import quantize_weight  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = (40, 1, 70, 3, 50, 4, 9)
"""The rows of each adapter, and of none: one tile and several, and few enough that B is read in place."""


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_each_adapter_is_right_over_its_own_rows(isa: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    q = Batch(random_ids(COUNTS), RANKS, dtype=dtype, adapter_dtype=adapter_dtype, p=0.3)
    q.check(q.run())


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_the_adapters_of_a_stack_are_right(isa: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    """The sums of 1100 terms are held to the bound of rounding: no adapter has rows enough for statistics, since MKL
    adds in wider registers than some of the instruction sets have."""
    q = Batch(random_ids((6, 1, 4, 30, 5, 3, 0)), RANKS, 130, 1100, dtype, adapter_dtype, stack=True)
    q.check(q.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_an_adapter_that_is_none_get_the_base_alone(isa: str, dtype: torch.dtype) -> None:
    q = Batch(random_ids(COUNTS), without_rank(RANKS, 2), dtype=dtype)
    q.check(q.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_operands_are_read_as_they_are(isa: str, dtype: torch.dtype) -> None:
    q = Batch(random_ids((9, 12, 3, 0, 5, 0, 4)), RANKS, dtype=dtype)
    q.strided()
    q.check(q.run())


@pytest.mark.parametrize("ids", [[], [-1, -1, -1], [2], [5, 5, 0, 5]])
def test_batches_of_few_rows(ids: list[int]) -> None:
    q = Batch(torch.tensor(ids, dtype=torch.int64), RANKS)
    got = q.run()
    q.check(got)
    assert got.y.shape == (len(ids), 70) and got.dx is not None and got.dx.shape == q.x.shape


@pytest.mark.parametrize("format", ["nf4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(2, 1, 4, 0, 1, 1, 3), COUNTS])
def test_a_quantised_base_is_read_with_every_adapter(
    isa: str, format: str, dtype: torch.dtype, counts: tuple[int, ...]
) -> None:
    q = Batch(random_ids(counts), RANKS, 70, 128, dtype)
    w = q.w
    q.w = quantize_weight(w.float(), format)
    got = q.run()
    q.check(got)
    alone = cpu.forward_multi(q.x, Base(q.w, q.bias), [None] * 6, Rows.by_id(torch.full_like(q.ids, -1), 6), False)[0]
    rows = q.rows_of(-1)
    assert torch.equal(got.y[rows], alone[rows])


def test_masks_are_those_of_eager(isa: str) -> None:
    """h is c times the mask where x is one and A is the identity."""
    K, ids = 70, random_ids((9, 1, 12, 4))
    seeds = [torch.tensor(1 << 50), torch.tensor(-3), torch.tensor(5)]
    adapters = [Adapter(torch.eye(K), torch.ones(8, K), 1.0, 0.4, seed) for seed in seeds]
    arguments = torch.ones(len(ids), K), Base(torch.zeros(8, K)), adapters, Rows.by_id(ids, 3), True
    h, want = cpu.forward_multi(*arguments)[1], eager.forward_multi(*arguments)[1]
    assert h is not None and torch.equal(h, want) and 0.3 < (h == 0).float().mean() < 0.5


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_a_gradient_alone_has_the_same_bits_as_beside_the_others(isa: str, adapter_dtype: torch.dtype) -> None:
    q = Batch(random_ids(COUNTS), RANKS, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, p=0.1)
    none, everything = (False,) * 6, q.run()
    third = (False, False, True, False, False, False)
    dx = q.run(needs=Needs(True, none, none))
    assert dx.dx is not None and torch.equal(dx.dx, everything.dx) and dx.da == dx.db == [None] * 6
    for name, needs in (("da", Needs(False, third, none)), ("db", Needs(False, none, third))):
        alone, all_of_them = getattr(q.run(needs=needs), name), getattr(everything, name)
        assert torch.equal(alone[2], all_of_them[2]) and sum(each is not None for each in alone) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_earlier_call_left_in_memory_is_not_read(isa: str, dtype: torch.dtype, poison: None) -> None:
    q = Batch(random_ids((5, 2, 9, 0, 7, 3, 2)), RANKS, dtype=dtype, p=0.2)
    larger = Batch(random_ids(COUNTS), RANKS, 300, 300, dtype, p=0.2)
    larger.x.fill_(torch.nan)
    larger.dy.fill_(torch.nan)
    larger.run()
    q.check(q.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [False, True])
def test_reads_and_writes_stay_inside_the_operands(isa: str, dtype: torch.dtype, stored: bool) -> None:
    """Every operand ends at the last byte before a page that must not be touched. `stored` is the layout of a stack."""
    q = Batch(random_ids((5, 1, 70, 2, 9)), (3, 8, 5, 70), 37, 45, dtype, p=0.1)
    want = q.run()
    n, threads = len(q.given), torch.get_num_threads()
    with fences() as fenced:
        adapters = []
        for each in q.given:
            assert each is not None
            b = fenced(each.b.t()).t() if stored else fenced(each.b)
            adapters.append(each._replace(a=fenced(each.a), b=b))
        order, starts, h = (fenced(t) for t in (q.rows.order, q.rows.starts, torch.full_like(want.h, torch.nan)))
        y, x, dy = torch.nn.functional.linear(q.x, q.w, q.bias), fenced(q.x), fenced(q.dy)
        y, dx = fenced(y), fenced(cpu.base_gemm(q.dy, q.w.t(), None))
        da, db = ([fenced(torch.full_like(t, torch.nan)) for t in grads] for grads in (want.da, want.db))
        _C.forward_multi(threads, x, Base(q.w), adapters, order, starts, y, h, False)
        _C.backward_multi(threads, dy, x, Base(q.w), adapters, order, starts, h, dx, da, db, False)
        assert torch.equal(y, want.y) and torch.equal(dx, want.dx)
        assert torch.equal(h, want.h)
        assert all(torch.equal(da[i], want.da[i]) and torch.equal(db[i], want.db[i]) for i in range(n))


def test_rows_that_do_not_lie_in_x_are_refused() -> None:
    q = Batch(torch.tensor([0, 1, 0]), (4, 4))
    q.rows.order[1] = 3
    with pytest.raises(ValueError, match=r"must lie in 0\.\.2"):
        q.run()
    with pytest.raises(ValueError, match="order of the rows as a contiguous tensor of 3 elements of 32 bits"):
        wrong = Rows(torch.tensor([0, 1]), torch.tensor([0, 1, 2], dtype=torch.int32))
        cpu.forward_multi(q.x, Base(q.w), q.adapters, wrong, False)


def test_an_h_that_is_too_small_is_refused() -> None:
    q = Batch(torch.tensor([0, 1, 0]), (4, 4))
    needs = Needs(False, (False, False), (True, True))
    with pytest.raises(ValueError, match="an h of at least 12 elements here, got 11"):
        cpu.backward_multi(q.dy, None, Base(q.w), q.adapters, q.rows, torch.zeros(11), needs)
