"""Many adapters over the rows of one x in the back-end `composite`, in Triton's interpreter. The tiles are so small
that most adapters have several. Reading the number of rows on the host, which would wait for a GPU, is an error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import judging

from lora_kernels.core.many import Adapter, AdapterStack
from lora_kernels.core.operands import Base, Call, Needs
from lora_kernels.core.rows import Rows

pytest.importorskip("lora_kernels.backends.composite", exc_type=ImportError)
from support.composite_interp import CPU, interpreted, target
from support.mixed_rows import RANKS, Batch, Results, batch, check, run

from lora_kernels.backends import composite
from lora_kernels.backends.composite import adapter_table, tiles
from lora_kernels.backends.triton.device import Frame
from lora_kernels.quant.weight import quantize_weight

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of rows are not known on the host, as on a GPU."""

    def waits(rows: Rows) -> tuple[int, ...]:
        raise AssertionError("this would wait for the GPU")

    monkeypatch.setattr(Rows, "counts", property(waits))
    monkeypatch.setattr(Rows, "known_counts", property(lambda rows: None))


def results(q: Batch, *args: Any) -> Results:
    with interpreted() as backend:
        return run(backend, q, *args)


@pytest.mark.parametrize(
    "dtypes", [*(pytest.param(each, marks=pytest.mark.slow) for each in judging.DTYPES[:4]), judging.DTYPES[4]], ids=str
)  # fmt: skip
def test_results_are_right_for_any_mix_of_adapters(dtypes: tuple[torch.dtype, torch.dtype], poison: None) -> None:
    q = batch(20, 17, 33, [*RANKS, None], dtype=dtypes[0], adapter_dtype=dtypes[1])
    check(q, results(q))


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_results_are_right_where_statistics_judge_them(dtypes, strided: bool, poison: None) -> None:
    q = batch(230, 70, 75, [(16, 0.0), (40, 0.3), (8, 0.1)], dtype=dtypes[0], adapter_dtype=dtypes[1], strided=strided)
    check(q, results(q))


@pytest.mark.slow
def test_operands_may_have_any_strides(poison: None) -> None:
    q = batch(18, 35, 33, [(3, 0.3), (17, 0.0)], dtype=BF16, strided=True)
    check(q, results(q))


IDS = [[-1] * 5, [2, 2, 2, -1, 0, 0]]


@pytest.mark.parametrize("ids", [[], [1], *(pytest.param(each, marks=pytest.mark.slow) for each in IDS)], ids=str)
def test_adapters_without_rows_get_gradients_of_zero(ids: list[int], poison: None) -> None:
    q = batch(len(ids), 24, 33, [(8, 0.1), (3, 0.0), (16, 0.0)], dtype=BF16, ids=torch.tensor(ids, dtype=torch.int64))
    got = results(q)
    check(q, got)
    assert all(t is not None for t in (*got.da, *got.db))


def test_adapters_known_to_have_no_rows_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "known_counts", property(lambda rows: (0, 3)))
    q = batch(3, 24, 33, [(8, 0.1), (3, 0.0)], dtype=BF16, ids=torch.tensor([1, 1, 1]))
    got = results(q)
    check(q, got)
    assert got.da[0] is None and got.db[0] is None
    assert got.h is not None and got.h.numel() == 9


def test_a_capture_has_room_for_other_rows_than_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "known_counts", property(lambda rows: (0, 3)))
    q = batch(3, 17, 33, [(8, 0.1), (3, 0.0)], dtype=BF16, ids=torch.tensor([1, 1, 1]))
    with interpreted(target()._replace(capturing=lambda: True)) as backend:
        got = run(backend, q)
    assert got.h is not None and got.h.numel() == 3 * 8
    assert got.da[0] is not None and not got.da[0].count_nonzero()


NEEDS = [(True, False, False), (False, True, False), (False, False, True), (False, True, True), (True, True, False)]


@pytest.mark.slow
@pytest.mark.parametrize("dx, da, db", NEEDS)
def test_only_what_is_needed_is_computed(dx: bool, da: bool, db: bool, poison: None) -> None:
    q = batch(20, 24, 33, [(8, 0.1), (40, 0.0)], dtype=BF16)
    needs = Needs(dx, (da, False), (False, db))
    check(q, results(q, needs), needs)


@pytest.mark.parametrize(
    "M, adapters",
    [(20, [(8, 0.3), (20, 0.0)]), pytest.param(60, [*RANKS, (200, 0.1)], marks=pytest.mark.slow)],
    ids=["two", "many"],
)
def test_nothing_of_an_adapter_depends_on_its_neighbours(M: int, adapters: list[tuple[int, float]]) -> None:
    """Its rows have the same bits alone and among others whose ranks and numbers of rows are larger."""
    q = batch(M, 17, 33, adapters, dtype=BF16, bias=False)
    q = replace(q, w=torch.zeros_like(q.w))  # y and dx are then what the adapters add
    with interpreted() as backend:
        whole = run(backend, q)
        for i in range(len(adapters) - 1):
            alone, own = run(backend, q.only(i)), q.of(i)
            assert torch.equal(alone.y, whole.y[own]) and torch.equal(alone.dx, whole.dx[own])
            for got, wanted in ((alone.da[i], whole.da[i]), (alone.db[i], whole.db[i])):
                assert got is not None and wanted is not None and torch.equal(got, wanted)


@pytest.mark.slow
def test_an_adapter_that_is_nan_harms_no_other() -> None:
    q = batch(12, 24, 33, [(8, 0.1), (3, 0.0), (16, 0.0)], dtype=BF16)
    clean = results(q)
    for t in q.adapters[1][:2]:
        t.fill_(torch.nan)
    got = results(q)
    others = q.ids != 1
    assert got.y[~others].isnan().all()
    assert torch.equal(got.y[others], clean.y[others]) and torch.equal(got.dx[others], clean.dx[others])
    for i in (0, 2):
        assert torch.equal(got.da[i], clean.da[i]) and torch.equal(got.db[i], clean.db[i])


def _segments(M: int, count: int, n: int, base: int) -> torch.Tensor:
    """Return ids in which the first `base` rows have no adapter, and `count` of n adapters share the others."""
    ids = torch.full((M,), -1)
    ids[base:] = torch.arange(M - base) * count // (M - base) * 3 % n
    return ids


EIGHT = [(8, 0.1), (3, 0.0), (40, 0.0), (16, 0.2), (1, 0.0), (13, 0.0), (20, 0.1), (8, 0.0)]


@pytest.mark.parametrize(
    "M, adapters, divisions",
    [
        (17, EIGHT[:2], [(1, 0), (2, 12)]),
        pytest.param(40, EIGHT, [(1, 0), (8, 0), (2, 3), (3, 30)], marks=pytest.mark.slow),
    ],
    ids=["two", "eight"],
)
def test_launches_that_were_captured_serve_any_division_of_the_rows(M: int, adapters, divisions, poison: None) -> None:
    """As a CUDA graph does, the same launches run again over other rows, in memory that the last ones have left.
    `divisions` gives the number of adapters that have rows, and how many rows have none."""
    n = len(adapters)
    q = batch(M, 17, 33, adapters, dtype=BF16, ids=_segments(M, 1, n, 0))
    rows, launches, run_frame = q.rows, [], Frame.run
    with interpreted() as backend, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Frame, "run", lambda frame, **others: launches.append((frame, others)))
        captured = run(backend, q, rows=rows)
        patch.setattr(Frame, "run", run_frame)
        for count, base in divisions:
            new = replace(q, ids=_segments(M, count, n, base))
            rows.order.copy_(new.rows.order)
            rows.starts.copy_(new.rows.starts)
            captured.y.copy_(torch.nn.functional.linear(q.x, q.w, q.bias))
            captured.dx.copy_(q.dy @ q.w)
            for frame, others in launches:
                frame.run(**others)
            check(new, captured)
            fresh = run(backend, new)
            for got, wanted in zip((captured.y, captured.dx, *captured.da, *captured.db),
                                   (fresh.y, fresh.dx, *fresh.da, *fresh.db), strict=True):  # fmt: skip
                assert torch.equal(got, wanted)


@pytest.mark.slow
def test_a_quantised_w_is_dequantised_for_the_call(poison: None) -> None:
    q = batch(20, 32, 64, [(8, 0.0), (3, 0.0)], dtype=BF16)
    w = quantize_weight(q.w, "nf4")
    dense = replace(q, w=w.dequantize(BF16))
    with interpreted() as backend:
        got, wanted = run(backend, replace(q, w=w)), run(backend, dense)
    assert torch.equal(got.y, wanted.y) and torch.equal(got.dx, wanted.dx)


def _stack(q: Batch) -> AdapterStack:
    return AdapterStack([None if each is None else Adapter(each.a, each.b, each.scale) for each in q.adapters])


def test_a_stack_gives_what_a_list_gives_and_its_table_is_kept_until_it_is_replaced() -> None:
    q = batch(14, 17, 33, [(8, 0.0), None, (3, 0.0)], dtype=BF16)
    stack, base = _stack(q), Base(q.w, q.bias)
    with interpreted() as backend:
        wanted, _ = backend.forward_multi(q.x, base, q.adapters, q.rows, False)
        for _ in range(2):
            y, _ = backend.forward_multi(q.x, base, stack, q.rows, False)
            assert torch.equal(y, wanted)
        kept = stack.native
        assert isinstance(kept, adapter_table.Kept) and len(kept.tables) == 1
        stack.replace({0: stack[2], 2: None})
        assert stack.native is None
        y, _ = backend.forward_multi(q.x, base, stack, q.rows, False)
        replaced, _ = backend.forward_multi(q.x, base, [q.adapters[2], None, None], q.rows, False)
    assert torch.equal(y, replaced) and not torch.equal(y, wanted)


def test_every_stream_writes_its_own_table_and_a_capture_keeps_none() -> None:
    """Nothing orders what two streams do, and a graph writes its memory when it is replayed."""
    q = batch(5, 24, 33, [(8, 0.0)], dtype=BF16)
    stack = _stack(q)
    with interpreted():
        captured = target()._replace(capturing=lambda: True)
        first, second = adapter_table.table_of(captured, stack), adapter_table.table_of(captured, stack)
        assert first is not second and stack.native is None
        here, there = target(), target()._replace(stream=lambda: 7)
        tables = [adapter_table.table_of(each, stack) for each in (here, there, here, there)]
    assert tables[0] is tables[2] and tables[1] is tables[3] and tables[0] is not tables[1]


def test_the_grids_have_room_for_any_division() -> None:
    generator = torch.Generator().manual_seed(0)
    for M, n, block in ((1, 1, 16), (7, 3, 16), (100, 40, 16), (512, 4, 32), (33, 2, 16)):
        room = tiles.tiles_of_multi(M, n, block)
        for _ in range(200):
            cuts = torch.randint(0, M + 1, (n - 1,), generator=generator).sort().values.tolist()
            counts = [after - before for before, after in zip([0, *cuts], [*cuts, M], strict=True)]
            assert sum(-(-count // block) for count in counts) <= room
        assert room <= M


def test_nothing_is_asked_of_the_rank_or_the_number_of_rows() -> None:
    """The kernels of one pass and pair of dtypes are one class, whatever the sizes."""
    with interpreted():
        for op in ("forward_multi", "backward_multi"):
            call = Call(op, CPU, BF16, FP32, 64, 24, 33, 8, False)
            assert composite.why_not(call) == []
            assert composite.kernel_class(call) == composite.kernel_class(call._replace(M=4096, R=256))
        refused = composite.why_not(call._replace(op="add_multi"))
    assert refused == ["adds many adapters to a base product of its own, not to a given y"]
