"""Lists of layers over one x in the back-end `composite`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support import judging

from lora_kernels.core import accuracy
from lora_kernels.core.operands import Adapter, Base, Call, Needs

pytest.importorskip("lora_kernels.backends.composite", exc_type=ImportError)
from support.composite_interp import interpreted, target

from lora_kernels.backends import composite, first_use
from lora_kernels.backends.composite import tiles
from lora_kernels.backends.triton.device import Frame

M, K = 97, 70
QKV = [(70, 16, 0.3), (33, 16, 0.0), (40, 13, 0.5)]
"""(N, R, p) of three layers that one set of launches serves."""
MIXED = [(40, 16, 0.0), (24, 33, 0.2), (70, 5, 0.3), (16, 20, 0.0), (18, 16, 0.0)]
"""Layers that take several sets of launches: the ranks are too large together, or one takes several chunks."""


def problems(layers: list[tuple[int, int, float]], dtype: torch.dtype, adapter_dtype: torch.dtype):
    """Return a problem for each layer; all of them have the same x."""
    found = []
    for number, (N, R, p) in enumerate(layers):
        q = judging.problem(
            M, N, K, R, dtype=dtype, adapter_dtype=adapter_dtype, p=p, bias=number % 2 == 0, scale=0.5 + number,
            seed=number,
        )  # fmt: skip
        found.append(judging.Problem(**{**vars(q), "x": found[0].x if found else q.x}))
    return found


def run(qs: list[judging.Problem], needs: Needs, backend):
    """Return (ys, dx, das, dbs) of a list."""
    bases, adapters = [q.base for q in qs], [q.adapter for q in qs]
    ys, hs = backend.forward(qs[0].x, bases, adapters, needs.db)
    assert [h is not None for h in hs] == list(needs.db)
    x = qs[0].x if any(needs.da) else None
    return ys, *backend.backward([q.dy for q in qs], x, bases, adapters, hs, needs)


def check(qs: list[judging.Problem], needs: Needs, ys, dx, das, dbs) -> None:
    """Judge every result. dx is judged beside the sum of plain torch's."""
    for q, y, da, db, *wanted in zip(qs, ys, das, dbs, needs.da, needs.db, strict=True):
        assert [da is not None, db is not None] == wanted
        judging.check({"y": y, "da": da, "db": db}, q)
    assert (dx is not None) == needs.dx
    if needs.dx:
        exact = sum(judging.truth(q)["dx"] for q in qs)
        plain = [judging.evaluate(q)["dx"] for q in qs]
        for each in plain[1:]:
            plain[0] += each
        assert accuracy.errors_beside(dx, exact, plain[0]).fault is None


@pytest.mark.parametrize("layers", [QKV, pytest.param(MIXED, marks=pytest.mark.slow)], ids=["qkv", "mixed"])
@pytest.mark.parametrize(
    "dtypes", [pytest.param(judging.DTYPES[0], marks=pytest.mark.slow), judging.DTYPES[2], judging.DTYPES[3]], ids=str
)
def test_the_results_of_a_list_are_right(layers, dtypes, poison: None) -> None:
    qs = problems(layers, *dtypes)
    needs = Needs(True, (True,) * len(qs), (True,) * len(qs))
    with interpreted() as backend:
        check(qs, needs, *run(qs, needs, backend))


@pytest.mark.parametrize(
    "needs",
    [
        Needs(False, (True, False, True), (True, False, True)),
        Needs(True, (True, False, False), (True, False, True)),
        *(
            pytest.param(needs, marks=pytest.mark.slow)
            for needs in (
                Needs(True, (False, False, False), (False, False, False)),
                Needs(False, (True, True, True), (False, False, False)),
                Needs(False, (False, False, False), (False, True, True)),
            )
        ),
    ],
)
def test_only_what_is_needed_of_a_list_is_computed(needs: Needs, poison: None) -> None:
    qs = problems(QKV, torch.bfloat16, torch.bfloat16)
    with interpreted() as backend:
        check(qs, needs, *run(qs, needs, backend))


def test_one_base_with_several_adapters_is_a_list(poison: None) -> None:
    first, second = problems([(33, 8, 0.3), (33, 16, 0.1)], torch.bfloat16, torch.bfloat16)
    qs = [first, judging.Problem(**{**vars(second), "w": first.w, "bias": first.bias})]
    needs = Needs(True, (True, True), (True, True))
    with interpreted() as backend:
        check(qs, needs, *run(qs, needs, backend))


def test_a_list_takes_one_set_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """x is read by one launch in a forward and by one in a backward."""
    launched: Counter[str] = Counter()

    run_frame = Frame.run

    def count(frame: Frame, **others: Any) -> None:
        launched[frame.kernel.__name__] += 1
        run_frame(frame, **others)

    monkeypatch.setattr(Frame, "run", count)
    qs = problems(QKV, torch.bfloat16, torch.bfloat16)
    with interpreted() as backend:
        run(qs, Needs(True, (True,) * 3, (True,) * 3), backend)
    assert launched == {"down": 1, "up": 1, "pass_over_dy": 1, "pass_over_x": 1, "add_parts": 2}


def _adapter(R: int, dtype: torch.dtype) -> Adapter:
    return Adapter(torch.empty(R, 8, dtype=dtype), torch.empty(8, R, dtype=dtype), 1.0)


@pytest.mark.parametrize(
    "ranks, dtype, expected",
    [
        ([8], torch.bfloat16, [(0, 1)]),
        ([8, 16, 16], torch.bfloat16, [(0, 3)]),
        ([8, 16, 16, 16], torch.bfloat16, [(0, 3), (3, 4)]),
        ([64, 64, 64], torch.bfloat16, [(0, 3)]),
        ([64, 64, 64], torch.float32, [(0, 1), (1, 2), (2, 3)]),
        ([128, 128], torch.bfloat16, [(0, 1), (1, 2)]),
        ([16, 16, 128, 16], torch.bfloat16, [(0, 2), (2, 3), (3, 4)]),
        ([300], torch.bfloat16, [(0, 1)]),
    ],
)
def test_a_list_is_served_in_pieces(ranks: list[int], dtype: torch.dtype, expected: list[tuple[int, int]]) -> None:
    pieces = list(composite._pieces(target(), [_adapter(R, dtype) for R in ranks]))
    assert [(piece.start, piece.stop) for piece in pieces] == expected


def test_a_sum_is_split_into_as_many_ranges_as_fit_into_one_wave() -> None:
    slots = tiles.PROGRAMS_PER_MULTIPROCESSOR * 132
    for length, block, others in ((4096, 64, 64), (4096, 128, 1), (100, 32, 300), (1, 16, 1), (14336, 64, 3)):
        steps, ranges = tiles.split(length, block, others, 132)
        assert (ranges - 1) * steps * block < length <= ranges * steps * block
        assert ranges == 1 or ranges * others <= slots
    assert tiles.split(0, 64, 1, 132)[1] == 0


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("length", [2, 4, 5, 7])
def test_the_check_of_a_list_launches_what_a_list_of_this_length_launches(op: str, length: int, monkeypatch) -> None:
    """A list of four is served as a list of three and a single layer, whose kernels are compiled differently."""
    launched = set()

    def record(self: Frame, **others: Any) -> None:
        blocks = tuple((name, value) for name, value in self.arguments.items() if name.startswith(("BLOCK", "NEED")))
        launched.add((self.kernel, blocks, *(len(value) for value in others.values() if isinstance(value, tuple))))

    monkeypatch.setattr(Frame, "run", record)
    few = judging.problem(17, 24, 16, 8, dtype=torch.bfloat16)
    layers = few.w, few.a, few.b, few.dy
    call = Call(op, few.x.device, few.x.dtype, few.x.dtype, 32, 24, 16, 8, False, layers=length)
    with interpreted() as backend:
        first_use._check(backend, call)
        checked = launched.copy()
        launched.clear()
        w, a, b, dy = ([each] * length for each in layers)
        bases, adapters = list(map(Base, w)), [Adapter(*each, 1.0) for each in zip(a, b, strict=True)]
        if op == "forward":
            backend.forward(few.x, bases, adapters, [True] * length)
        else:
            hs, every = [few.x.new_zeros(17, 8)] * length, (True,) * length
            backend.backward(dy, few.x, bases, adapters, hs, Needs(True, every, every))
    assert launched and launched <= checked
