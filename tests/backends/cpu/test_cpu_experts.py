"""Experts in one call of the CPU back-end, with every instruction set: each is judged over its own rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.experts_calls import COUNTS, Experts, check, experts, run_module
from support.fences import fences
from support.judging import DTYPES

_C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels were not built on this machine")
from lora_kernels.backends import cpu, eager  # noqa: E402
from lora_kernels.backends.cpu import experts as own  # noqa: E402
from lora_kernels.backends.cpu import gemm  # noqa: E402
from lora_kernels.core.operands import Needs  # noqa: E402


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["torch", "own"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two ways of the base products, where there are two."""
    monkeypatch.setattr(gemm, "chosen", lambda *arguments: request.param)
    return request.param


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("layout", ["rows", "peft"])
def test_each_expert_is_right_over_its_own_rows(
    isa: str, way: str, dtype: torch.dtype, adapter_dtype: torch.dtype, layout: str
) -> None:
    counts = (40, 0, 70, 3, 17, 1)
    m = experts(70, 90, 13, counts, rest=4, dtype=dtype, adapter_dtype=adapter_dtype, p=0.3, layout=layout)
    check(m, run_module(cpu, m))


@pytest.mark.parametrize(("R", "counts"), [(1, COUNTS), (64, (2, 49)), (100, (50, 3, 0)), (8, (300, 20))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_and_splits(isa: str, R: int, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    m = experts(64, 128, R, counts, dtype=dtype, p=0.1, layout="peft")
    check(m, run_module(cpu, m))


def test_masks_are_drawn_at_the_rows_of_x(isa: str) -> None:
    """h is c times the mask where x is one and A is the identity."""
    m = experts(8, 70, 70, (9, 0, 12, 4), rest=2, p=0.4)
    m = replace(m, x=torch.ones_like(m.x), a=torch.eye(70).expand(4, 70, 70))
    h, want = (module.forward_experts(m.x, m.base, m.adapter, m.rows, True)[1] for module in (cpu, eager))
    assert torch.equal(h, want) and 0.3 < (h[:25] == 0).float().mean() < 0.5
    mask = cpu.keep_mask(m.x, m.p, m.seed)
    assert torch.equal(h[:25] > 0, mask[:25] > 0)


@pytest.mark.parametrize("needs", [Needs(True, (False,), (False,)), Needs(False, (True,), (False,)),
                                   Needs(False, (False,), (True,)), Needs(False, (True,), (True,))])  # fmt: skip
def test_a_gradient_alone_has_the_same_bits_as_beside_the_others(isa: str, needs: Needs) -> None:
    m = experts(70, 90, 13, rest=2, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.1)
    every, got = run_module(cpu, m), run_module(cpu, m, needs=needs)
    for name, wanted in (("dx", needs.dx), ("da", needs.da[0]), ("db", needs.db[0])):
        assert torch.equal(got[name], every[name]) if wanted else got[name] is None
    assert torch.equal(run_module(cpu, m, save_h=False)["y"], every["y"])


@pytest.mark.parametrize("counts", [(6,) * 16, (300, *(2,) * 15), (0,) * 15 + (90,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_repetition_change_no_bit(
    counts: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large expert is computed by all threads together, and small ones by one thread each. torch's GEMM may depend on
    the threads, so the base products are our own."""
    if not _C.has_gemm(dtype):
        pytest.skip(f"this processor has no GEMM of our own for {dtype}")
    monkeypatch.setattr(gemm, "chosen", lambda *arguments: "own")
    m = experts(256, 512, 8, counts, rest=3, dtype=dtype, p=0.1, layout="peft")
    first = run_module(cpu, m)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again = run_module(cpu, m)
        assert all(torch.equal(first[name], again[name]) for name in first), threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_an_earlier_call_left_in_memory_is_not_read(isa: str, dtype: torch.dtype, poison: None) -> None:
    larger = experts(300, 300, 70, (90, 40), dtype=dtype, p=0.2)
    larger.x.fill_(torch.nan)
    larger.dy.fill_(torch.nan)
    run_module(cpu, larger)
    m = experts(70, 90, 13, rest=5, dtype=dtype, p=0.2, layout="peft")
    check(m, run_module(cpu, m))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_reads_and_writes_stay_inside_the_operands(isa: str, dtype: torch.dtype, layout: str) -> None:
    """Every operand ends at the last byte before a page that must not be touched. With "columns" B is stored as Bᵀ."""
    m = experts(37, 45, 5, (5, 0, 70, 2), dtype=dtype, p=0.1)
    want, threads, rows = run_module(cpu, m), 1, m.rows
    with fences() as fenced:
        x, dy, a, order, starts = map(fenced, (m.x, m.dy, m.a, rows.order, rows.starts))
        w, wt = fenced(m.w), fenced(m.w.transpose(1, 2).contiguous()).transpose(1, 2)
        b = fenced(m.b) if layout == "rows" else fenced(m.b.transpose(1, 2)).transpose(1, 2)
        base, low = torch.empty_like(m.dy), (a, b, m.scale, m.p, m.seed, order, starts)
        own._torch(base, m.x, m.w, m.bias, rows)
        y, h, dx = fenced(base), fenced(want["h"].fill_(torch.nan)), fenced(torch.empty_like(m.x))
        da, db = (fenced(torch.zeros_like(want[name])) for name in ("da", "db"))
        dx.zero_()
        _C.forward_experts(threads, x, *low, y, h, None)
        _C.backward_experts(threads, dy, x, *low, h, dx, da, db)
        assert torch.equal(da, want["da"]) and torch.equal(db, want["db"])
        if _C.has_gemm(dtype):
            for each in (w, wt):
                _C.gemm_experts(threads, x, each, order, starts, y, None)
                _C.gemm_experts(threads, dy, each.transpose(1, 2), order, starts, dx, None)
                assert not torch.isnan(y).any() and not torch.isnan(dx).any()


def test_of_a_weight_in_another_dtype_one_expert_is_converted_at_a_time(way: str) -> None:
    m = experts(70, 90, 13, rest=2, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    wide = replace(m, w=m.w.float())
    got, want = run_module(cpu, wide), run_module(eager, m)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_a_large_batch_may_take_any_way(way: str) -> None:
    m = experts(96, 64, 4, (200, 1, 0, 300), rest=1, bias=True)
    check(m, run_module(cpu, m))


@pytest.fixture
def m() -> Experts:
    return experts(6, 4, 2, (3, 2))


def test_sizes_that_do_not_fit_are_refused(m: Experts) -> None:
    rows, y = m.rows, torch.empty(5, 6)
    how = m.scale, 0.0, None, rows.order, rows.starts, y, None, None
    with pytest.raises(ValueError, match=r"lora_a of size \[2, 4\] here, got \[2, 3\]"):
        _C.forward_experts(1, m.x, m.a[:, :, :3].contiguous(), m.b, *how)
    with pytest.raises(ValueError, match="lora_b of 2 experts here, got 1"):
        _C.forward_experts(1, m.x, m.a, m.b[:1], *how)
    with pytest.raises(ValueError, match="contiguous rows or columns"):
        _C.forward_experts(1, m.x, m.a, torch.empty(2, 12, 4)[:, ::2, ::2], *how)
    with pytest.raises(ValueError, match="lora_a of experts with a last stride of 1, got 2"):
        _C.forward_experts(1, m.x, torch.empty(2, 2, 8)[:, :, ::2], m.b, *how)
    with pytest.raises(ValueError, match="three dimensions, got 2"):
        _C.forward_experts(1, m.x, m.a[0], m.b, *how)
    with pytest.raises(ValueError, match="starts of the adapters as a contiguous tensor of 3 elements"):
        _C.gemm_experts(1, m.x, m.w, rows.order, rows.starts[:2], y, None)
    with pytest.raises(TypeError, match="needs h, got None"):
        _C.backward_experts(1, m.dy, m.x, m.a, m.b, *how[:5], None, None, None, m.b)


def test_without_an_exchange_of_tensors_the_same_is_computed(m: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of a subclass whose strides are read by Python's methods."""

    class Kind(torch.Tensor):
        pass

    want = run_module(cpu, m)
    kinds = {name: getattr(m, name).as_subclass(Kind) for name in ("a", "b", "w")}
    got = run_module(cpu, replace(m, **kinds))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_base_of_an_expert_has_the_bits_that_it_has_alone() -> None:
    m = experts(96, 64, 4, (200, 1, 0, 30), bias=False)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = torch.empty_like(m.dy)
        own._own(y, m.x, m.w, None, m.rows)
        for e, first, last in m.spans():
            if last > first:
                assert torch.equal(y[first:last], gemm.own(m.x[first:last], m.w[e]))
