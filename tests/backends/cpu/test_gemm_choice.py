"""The choice between torch's and our own base GEMM on the CPU does not make results differ between calls."""

from __future__ import annotations

import threading

import pytest
import torch

from lora_kernels import lora_linear, quantize_weight

cpu_gemm = pytest.importorskip("lora_kernels.backends.cpu.gemm")
_C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels are not built")


@pytest.fixture
def no_choices(monkeypatch):
    """The table of choices, empty as in a new process."""
    made: dict = {}
    monkeypatch.setattr(cpu_gemm, "_choices", made)
    return made


@pytest.mark.parametrize("quantised", [False, True])
def test_deterministic_algorithms_leave_nothing_to_the_clock(no_choices, monkeypatch, quantised):
    """The bits are the same where torch's GEMM would be the faster and where ours would be."""
    x, w, dy = torch.randn(40, 300), torch.randn(200, 300), torch.randn(40, 200)
    weight = quantize_weight(w, "nf4") if quantised else w
    a, b = torch.randn(4, 300), torch.randn(200, 4)

    def run(winner: str) -> list[torch.Tensor]:
        no_choices.clear()
        monkeypatch.setattr(cpu_gemm, "_faster", lambda *_: winner)
        leaf = x.clone().requires_grad_()
        y = lora_linear(leaf, weight, a, b, scale=0.5, backend="cpu")
        y.backward(dy)
        return [y.detach(), leaf.grad]

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run("torch"), run("own")
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(map(torch.equal, first, second)) and not no_choices


def test_one_of_several_threads_decides_for_all(no_choices, monkeypatch):
    winners, together, seen = iter(["torch", "own"]), threading.Barrier(2), []

    def slow(*_):
        winner = next(winners)
        together.wait(10)  # both have begun to time before either is done
        return winner

    monkeypatch.setattr(cpu_gemm, "_faster", slow)
    x, w = torch.randn(40, 64), torch.randn(64, 64)

    def choice() -> str:
        return cpu_gemm.chosen(cpu_gemm._RACE, "float32", 40, w.numel(), False, x, w)

    threads = [threading.Thread(target=lambda: seen.append(choice())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 1 and seen[0] == choice()


def test_a_choice_outlives_a_change_of_the_instruction_set(no_choices, monkeypatch):
    """Results must not change from call to call."""
    best, x, w = _C.cpu_isa(), torch.randn(40, 64), torch.randn(64, 64)
    monkeypatch.setattr(cpu_gemm, "_faster", lambda *_: "own")
    cpu_gemm.base_gemm(x, w)
    monkeypatch.setattr(cpu_gemm, "_faster", lambda *_: "torch")
    try:
        _C.set_cpu_isa("baseline")
        cpu_gemm.base_gemm(x, w)
    finally:
        _C.set_cpu_isa(best)
    assert set(no_choices.values()) <= {"own"} and len(no_choices) == _C.has_gemm(x.dtype)


@pytest.mark.parametrize(
    ("own", "theirs", "winner"),
    [
        ([9, 5, 5, 5], [9, 6, 6, 6], "own"),
        ([9, 5, 5, 5], [9, 6, 5, 6], "torch"),  # ours is not faster in every round
        ([9, 50, 5, 5], [9, 100, 6, 6], "own"),  # the machine was busy with something else in one round
        ([1, 5, 5, 5], [9, 5, 5, 5], "torch"),  # the first round is a warm-up, and equal times are not faster
    ],
)
def test_ours_is_taken_where_it_is_faster_in_every_round(monkeypatch, own, theirs, winner):
    now = [0.0]
    monkeypatch.setattr(cpu_gemm.time, "perf_counter", lambda: now[0])

    def gemm(seconds: list[float]):
        each = iter(seconds)
        return lambda: now.__setitem__(0, now[0] + next(each))

    assert cpu_gemm._faster(cpu_gemm.Race(gemm(theirs), gemm(own), 0.95)) == winner
