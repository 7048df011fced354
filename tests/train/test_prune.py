"""Pruning makes the right elements of an optimiser's moments zero, and nothing else."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear
from lora_kernels.train import restart
from lora_kernels.train.prune import smallest

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=False),
    "AdamW with amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
}


def layer() -> FusedLoRALinear:
    made = FusedLoRALinear(13, 17, r=3)
    nn.init.normal_(made.lora_B)
    return made


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.randn(5, 13)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def moments(optimizer: Any, p: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in optimizer.state[p].items() if isinstance(value, Tensor) and value.dim()}


def kept_by_the_paper(m: Tensor, q: float) -> Tensor:
    """Return the elements that are above the quantile q of |m|, which has no ties here."""
    return m.abs() > torch.quantile(m.abs().flatten(), q)


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("q", [0.5, 0.9])
def test_the_elements_with_the_smallest_first_moment_become_zero(name: str, q: float) -> None:
    model = layer()
    optimizer = OPTIMISERS[name]([p for p in model.parameters() if p.requires_grad])
    for _ in range(4):  # after one step all moments have the same order
        step(model, optimizer)
    before = copy.deepcopy({which: dict(optimizer.state[getattr(model, which)]) for which in ("lora_A", "lora_B")})
    report = restart(model, optimizer, prune=q)
    seen = 0
    for which, old in before.items():
        state = optimizer.state[getattr(model, which)]
        assert state.keys() == old.keys()
        first = next(key for key in ("exp_avg", "momentum_buffer", "square_avg") if key in old)
        kept = kept_by_the_paper(old[first], q)
        for key, value in old.items():
            if isinstance(value, Tensor) and value.dim() == 2:
                assert torch.equal(state[key], value * kept), key
                seen += value.numel()
            else:
                assert state[key] is value or state[key] == value, key  # Adam's step goes on
    assert report.moments == seen > 0 and report.zeros / seen == pytest.approx(q, abs=0.03)


@pytest.mark.parametrize("how", ["magnitude", "random"])
def test_the_next_step_of_adam_moves_no_element_far(how: str) -> None:
    # An element with a first moment and without a second one would move by lr·m/eps, where its gradient is zero.
    model = layer()
    optimizer = torch.optim.AdamW([model.lora_A, model.lora_B], lr=1e-3, weight_decay=0)
    for _ in range(3):
        step(model, optimizer)
    restart(model, optimizer, prune=0.5, how=how)
    for p in (model.lora_A, model.lora_B):
        first, second = optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
        assert torch.equal(first != 0, second != 0)
        p.grad = torch.zeros_like(p)
    before = model.lora_A.detach().clone()
    optimizer.step()
    assert 0 < (model.lora_A - before).abs().max() < 5e-3


def test_other_parameters_keep_their_moments() -> None:
    model = nn.Sequential(layer(), nn.Linear(17, 4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    step(model, optimizer)
    before = copy.deepcopy(moments(optimizer, model[1].weight))
    restart(model, optimizer, prune=1.0)
    assert all(torch.equal(value, before[key]) for key, value in moments(optimizer, model[1].weight).items())
    assert not any(value.any() for value in moments(optimizer, model[0].lora_A).values())


@pytest.mark.parametrize(("n", "q", "count"), [(101, 0.29, 30), (10, 0.5, 5), (11, 0.5, 6), (10, 0.99, 9), (1, 0.5, 1)])
def test_exactly_the_fraction_is_taken_also_among_equal_elements(n: int, q: float, count: int) -> None:
    assert smallest(torch.rand(n), q).sum() == count
    assert smallest(torch.ones(n), q).tolist() == [True] * count + [False] * (n - count)
    ties = torch.tensor([2.0] * (n // 2) + [1.0] * (n - n // 2))
    order = sorted(range(n), key=lambda i: (ties[i].item(), i))
    assert smallest(ties, q).nonzero().flatten().tolist() == sorted(order[:count])


def test_moments_that_are_nan_count_as_the_largest() -> None:
    broken = torch.tensor([math.nan, 1.0, math.nan, 2.0, math.nan])
    assert smallest(broken, 0.25).nonzero().flatten().tolist() == [1, 3]
    assert smallest(broken, 0.5).nonzero().flatten().tolist() == [0, 1, 3]


def test_the_fraction_0_takes_none_and_1_takes_all() -> None:
    assert smallest(torch.zeros(2, 5), 0.0).sum() == 0 and smallest(torch.rand(2, 5), 1.0).all()


def test_pruning_has_no_limit_of_16_million_elements() -> None:
    large = torch.arange(17_000_000, dtype=torch.float32)  # torch.quantile refuses so many before torch 2.14
    assert smallest(large, 0.9).sum() == math.floor(0.9 * (large.numel() - 1)) + 1


def test_moments_of_a_matrix_that_layers_share_are_pruned_once() -> None:
    model = nn.Sequential(layer(), nn.Linear(17, 13), layer())
    model.double()
    model[2].lora_A = model[0].lora_A
    optimizer = torch.optim.SGD(list({p for p in model.parameters() if p.requires_grad}), 1e-3, momentum=0.9)
    x = torch.randn(5, 13, dtype=torch.float64)
    model(x).square().mean().backward()
    optimizer.step()
    y = model(x)
    report = restart(model, optimizer, prune=0.5, how="random")
    torch.testing.assert_close(model(x), y)
    shared = optimizer.state[model[0].lora_A]["momentum_buffer"]
    assert 0.2 < (shared == 0).float().mean() < 0.7
    assert report.moments == shared.numel() + 2 * model[0].lora_B.numel()


def test_random_pruning_hits_the_moments_of_an_element_together_and_follows_the_generator() -> None:
    kept = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = layer()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        step(model, optimizer)
        restart(model, optimizer, prune=0.6, how="random", generator=torch.Generator().manual_seed(seed))
        masks = [value != 0 for value in moments(optimizer, model.lora_B).values()]
        assert len(masks) == 2 and torch.equal(*masks)
        kept.append(masks[0])
        assert 0.2 < masks[0].float().mean() < 0.6
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


def test_a_first_step_that_is_still_to_come_leaves_nothing_to_prune() -> None:
    model = layer()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    report = restart(model, optimizer)
    assert (report.zeros, report.moments) == (0, 0) and not optimizer.state


def test_several_optimisers_and_accelerates_are_pruned() -> None:
    model = layer()
    first, second = torch.optim.SGD([model.lora_A], 1e-3, momentum=0.9), torch.optim.AdamW([model.lora_B])
    accelerate = pytest.importorskip("accelerate")
    wrapped = accelerate.Accelerator(cpu=True).prepare(second)
    step(model, first)
    model(torch.randn(5, 13)).square().sum().backward()
    wrapped.step()
    report = restart(model, [first, wrapped], prune=1.0)
    assert report.moments == report.zeros == model.lora_A.numel() + 2 * model.lora_B.numel()


def test_unknown_states_and_foreign_optimisers_are_refused_before_anything_changes() -> None:
    model = layer()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    step(model, optimizer)
    optimizer.state[model.lora_B]["curvature"] = torch.zeros(17, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"curvature \(a Tensor in torch.float32, \(17, 3\)\) of the layer.B"):
        restart(model, optimizer)
    with pytest.raises(ValueError, match=r"does not have the layer\.A, the layer\.B"):
        restart(model, torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    with pytest.raises(ValueError, match=r"got 'reset'.*prune=0\.999"):
        restart(model, optimizer, how="reset")
    with pytest.raises(ValueError, match="from 0 to 1, got 99"):
        restart(model, optimizer, prune=99)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["Adam8bit", "AdamW8bit", "Lion8bit"])
def test_the_codes_of_8_bit_moments_become_the_code_of_zero(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = FusedLoRALinear(512, 96, r=16)  # A is of 32 blocks of codes, and B too small for 8 bits
    nn.init.normal_(model.lora_B)
    optimizer = getattr(bnb.optim, kind)([model.lora_A, model.lora_B], lr=1e-3)
    for _ in range(2):
        model(torch.randn(5, 512)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state[model.lora_A]
    numbers = [i for i in "12" if f"state{i}" in state]
    assert state["state1"].dtype == torch.uint8 and optimizer.state[model.lora_B]["state1"].dtype == torch.float32

    def value(i: str) -> Tensor:
        blocks = state[f"qmap{i}"][state[f"state{i}"].long()].view(-1, 256)
        return (blocks * state[f"absmax{i}"][:, None]).view(16, 512)

    before = {i: value(i) for i in numbers}
    restart(model, optimizer, prune=0.9)
    count = math.floor(0.9 * (16 * 512 - 1)) + 1
    bound = before["1"].abs().flatten().sort().values[count - 1]
    for i in numbers:
        after = value(i)
        assert (after == 0).sum() >= count
        kept = before["1"].abs() > bound
        assert torch.equal(after[kept], before[i][kept])
        assert not after[before["1"].abs() < bound].any()
    restart(model, optimizer, prune=1.0)
    assert not any(value(i).any() for i in numbers)
    model(torch.randn(5, 512)).sum().backward()
    optimizer.step()
    assert torch.isfinite(model.lora_A).all()
