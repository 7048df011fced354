"""`jagged_cosine` is the authors' formula, and falls to zero at every restart."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from lora_kernels.train import jagged_cosine


def formula(t: int, total: int, cycle: int, first: int, again: int, least: float, ahead: int) -> float:
    """Return the factor at step t, written down from the paper's description by phases."""
    if t < first:
        return t / first
    at = t + ahead
    begun = at - at % cycle
    phase = at
    rise = 1.0
    if t >= cycle and at - begun < again:
        phase, rise = begun + again, (at - begun) / again
    angle = math.pi * (min(phase, total) - first) / (total - first)  # where the authors' factor would rise again
    return rise * (least + (1 - least) * (math.cos(angle) + 1) / 2)


@pytest.mark.parametrize("ahead", [0, 30])
def test_the_factor_is_that_of_the_formula_at_twenty_steps(ahead: int) -> None:
    factor = jagged_cosine(1000, 100, warmup=50, restart_warmup=7, minimum=0.1, adjust=ahead)
    for t in (0, 1, 49, 50, 51, 69, 70, 99, 100, 101, 106, 107, 108, 170, 199, 200, 203, 555, 901, 999):
        assert factor(t) == pytest.approx(formula(t, 1000, 100, 50, 7, 0.1, ahead), abs=1e-12), t


def test_some_values_by_hand() -> None:
    factor = jagged_cosine(40, 10, warmup=4, restart_warmup=2, minimum=0.2)
    assert [factor(t) for t in (0, 1, 2, 3, 4)] == [0, 0.25, 0.5, 0.75, 1]
    assert factor(22) == pytest.approx(0.6)  # half of the way from step 4 to step 40
    assert factor(21) == pytest.approx(0.3)  # and the step before, half of the warm-up to it
    assert factor(20) == 0


def test_it_is_zero_exactly_where_a_restart_is_due() -> None:
    factor = jagged_cosine(60, 12, warmup=3, restart_warmup=1)
    assert [t for t in range(61) if factor(t) == 0] == [0, 12, 24, 36, 48, 60]
    assert min(factor(t) for t in range(3, 60) if t % 12) >= 0.1


def test_without_a_second_warm_up_it_is_the_plain_cosine() -> None:
    factor = jagged_cosine(60, 12, warmup=3, restart_warmup=0)
    cosine = jagged_cosine(60, 60, warmup=3, restart_warmup=0)
    assert [factor(t) for t in range(61)] == [cosine(t) for t in range(61)]


def test_it_serves_a_scheduler_that_is_saved_and_loaded() -> None:
    def made() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        factor = pickle.loads(pickle.dumps(jagged_cosine(20, 10, warmup=2, restart_warmup=2)))
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    optimizer, scheduler = made()
    rates = []
    for step in range(20):
        if step == 7:
            state = scheduler.state_dict()
            optimizer, scheduler = made()
            scheduler.load_state_dict(state)
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [2 * jagged_cosine(20, 10, warmup=2, restart_warmup=2)(t) for t in range(1, 21)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 95}, r"steps=95 is no multiple of every=20.*steps=100"),
        ({"every": 0}, "every=0"),
        ({"warmup": 21}, r"21 \+ 0 must lie in 0 to every=20"),
        ({"warmup": 15, "adjust": 10}, r"15 \+ 10"),
        ({"restart_warmup": 20}, "restart_warmup=20 must lie in 0 to every - 1 = 19"),
        ({"minimum": 0.0}, r"\(0, 1\], got 0.0"),
        ({"steps": float("nan")}, "steps must be a number of steps, an int, got nan"),
    ],
)
def test_numbers_that_give_no_schedule_are_refused_by_name(wrong: dict[str, float], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        jagged_cosine(**({"steps": 100, "every": 20, "warmup": 5, "restart_warmup": 3} | wrong))
