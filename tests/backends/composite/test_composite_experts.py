"""The experts of one layer in the back-end `composite`, in Triton's interpreter, with so small tiles that most experts
have several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import judging
from support.experts_calls import Experts, check, experts, run_module

from lora_kernels.core.operands import Needs
from lora_kernels.core.rows import Rows

pytest.importorskip("lora_kernels.backends.composite", exc_type=ImportError)
from support.composite_interp import CPU, interpreted, target

from lora_kernels.backends import composite, eager
from lora_kernels.backends.composite import adapter_table
from lora_kernels.backends.composite import experts as own
from lora_kernels.core.operands import Adapter, call_of_experts

BF16 = torch.bfloat16


def results(m: Experts, needs: Needs | None = None, capturing: bool = False) -> dict[str, torch.Tensor]:
    """Return what the back-end gives, without h, whose rows without an expert are not written."""
    on = target()._replace(capturing=lambda: True) if capturing else None
    with interpreted(on) as backend:
        found = run_module(backend, m, needs=needs)
    return {name: t for name, t in found.items() if name != "h"}


SLOW = [(judging.DTYPES[0], 40, "peft"), (judging.DTYPES[3], 40, "strided")]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("dtypes", "R", "layout"),
    [(judging.DTYPES[4], 13, "peft"), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
    ids=str,
)
def test_results_are_right_for_any_split(dtypes: tuple[torch.dtype, torch.dtype], R: int, layout: str) -> None:
    m = experts(17, 33, R, (5, 0, 18, 1), rest=3, dtype=dtypes[0], adapter_dtype=dtypes[1], p=0.3, layout=layout)
    check(m, results(m))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("layout", ["rows", pytest.param("peft", marks=pytest.mark.slow)])
def test_the_grouped_product_of_torch_is_right(layout: str, capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a graph is captured, no number of rows may be read on the host."""
    m = experts(16, 24, 3, (5, 0, 18), rest=3, dtype=BF16, p=0.3, bias=False, layout=layout)
    rows, calls = m.rows, []
    assert rows.is_in_order
    inner = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *args, **how: calls.append(1) or inner(*args, **how))
    if capturing:

        def waits(rows: Rows) -> tuple[int, ...]:
            raise AssertionError("this would wait for the GPU")

        monkeypatch.setattr(Rows, "counts", property(waits))
    with interpreted(target()._replace(capturing=lambda: capturing)) as backend:
        y, h = backend.forward_experts(m.x, m.base, m.adapter, rows, True)
        needs = Needs(True, (True,), (True,))
        dx, da, db = backend.backward_experts(m.dy, m.x, m.base, m.adapter, rows, h, needs)
    assert len(calls) == 2
    check(m, {"y": y, "dx": dx, "da": da, "db": db})


def test_the_grouped_product_is_taken_where_it_is_made_for_the_operands() -> None:
    m, on = experts(16, 24, 3, (5, 2), dtype=BF16), target()
    assert own._grouped(on, m.x, m.w) and own._grouped(on, m.dy, m.w.transpose(1, 2))
    narrow = experts(15, 24, 3, (5, 2), dtype=BF16)
    assert not own._grouped(on, narrow.x, narrow.w)
    strided = experts(16, 24, 3, (5, 2), dtype=BF16, layout="strided")
    assert not own._grouped(on, strided.x, strided.w)
    for other in (m.x.float(), m.x.half(), m.x[:0], torch.empty(100, dtype=BF16)[1:97].view(4, 24)):
        assert not own._grouped(on, other, m.w)
    assert not own._grouped(target(arch="sm_75"), m.x, m.w) and not own._grouped(target(arch="gfx942"), m.x, m.w)


def test_a_capture_that_would_wait_is_refused_with_the_reason() -> None:
    m = experts(16, 24, 3, (5, 2), dtype=BF16)
    with pytest.raises(RuntimeError, match=r"grouped GEMM.*got torch.bfloat16, weight .*\(2, 16, 24\), a bias"):
        results(m, capturing=True)


NEEDS = [(True, False, False), (False, True, False), (False, False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("dx, da, db", NEEDS)
def test_only_what_is_needed_is_computed(dx: bool, da: bool, db: bool, poison: None) -> None:
    m = experts(17, 33, 8, (5, 0, 20), rest=2, dtype=BF16, p=0.3)
    got = results(m, Needs(dx, (da,), (db,)))
    assert [got[name] is not None for name in ("dx", "da", "db")] == [dx, da, db]
    check(m, got)


def test_masks_are_drawn_at_the_rows_of_x() -> None:
    m = experts(8, 40, 40, (9, 0, 21), p=0.4)
    m = replace(m, x=torch.ones_like(m.x), a=torch.eye(40).expand(3, 40, 40).contiguous())
    with interpreted() as backend:
        h = backend.forward_experts(m.x, m.base, m.adapter, m.rows, True)[1]
    assert torch.equal(h, eager.forward_experts(m.x, m.base, m.adapter, m.rows, True)[1])


@pytest.mark.parametrize("layout", ["rows", "peft", "strided"])
def test_one_launch_writes_the_numbers_that_a_list_of_adapters_has(layout: str) -> None:
    m = experts(16, 24, 8, (1,) * 11, layout=layout, p=0.25)
    da, db = torch.empty(11, 8, 24), torch.empty(11, 16, 8)
    listed = [Adapter(a, b, m.scale, m.p, m.seed) for a, b in zip(m.a, m.b, strict=True)]
    with interpreted():
        stacked = adapter_table.make_stack(m.adapter, da, db)
        want = adapter_table.make(listed, list(da), list(db))
    assert torch.equal(stacked.numbers.flatten(), want.numbers.flatten()[: stacked.numbers.numel()])
    assert stacked.facts == want.facts._replace(segments=True)


def test_the_classes_of_experts_are_those_of_the_pass_and_the_dtypes() -> None:
    m = experts(16, 24, 8, (3, 4), dtype=BF16)
    with interpreted():
        for op in ("forward_experts", "backward_experts"):
            call = call_of_experts(op, m.x, m.base, m.adapter)._replace(device=CPU)
            assert composite.why_not(call) == []
            assert composite.kernel_class(call) == composite.kernel_class(call._replace(M=4096, R=256))
