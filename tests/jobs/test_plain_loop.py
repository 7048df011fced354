"""A job does what a training loop written by hand does, and its layers draw dropout masks of their own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.job_problems import classifier, cross_entropy, samples
from torch import Tensor, nn

from lora_kernels import apply_lora
from lora_kernels.jobs import Job, Jobs, LoRAConfig


def test_a_job_beside_another_equals_a_loop_by_hand():
    config = LoRAConfig(r=4, lora_alpha=12, use_rslora=True, rank_pattern={"two": 2})
    data = [tuple(torch.stack(each) for each in zip(*samples(4, seed=i), strict=True)) for i in range(6)]
    optimizer = partial(torch.optim.AdamW, lr=0.02)
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    one = Job(
        "one", data, cross_entropy, config, optimizer=optimizer, schedule=schedule, accumulation=2, max_grad_norm=0.02
    )
    jobs = Jobs(classifier(), [one, Job("other", data[:3], cross_entropy, LoRAConfig(r=8), seed=5)])

    model = classifier()
    apply_lora(model, r=4, lora_alpha=12, use_rslora=True, rank_pattern={"two": 2})
    own = jobs.parameters("one")
    by_hand = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in own.items():
            by_hand[name].copy_(p)
    trained = [by_hand[name] for name in own]
    adamw = optimizer(trained)
    scheduler = schedule(adamw)
    norms = []
    for i, batch in enumerate(data):
        (cross_entropy(model(batch[0]), batch) / 2).backward()
        if i % 2:
            norms.append(float(nn.utils.clip_grad_norm_(trained, 0.02)))
            adamw.step()
            adamw.zero_grad()
            scheduler.step()

    jobs.run()
    assert min(norms) > 0.02  # every gradient was clipped
    now = jobs.progress()["one"]
    assert (now.step, now.phase, now.lr) == (3, "finished", 0.02 / 8)
    assert now.grad_norm == pytest.approx(norms[-1], rel=1e-9)
    for name, p in own.items():
        torch.testing.assert_close(p.detach(), by_hand[name].detach(), rtol=1e-9, atol=1e-12)


class Twins(nn.Module):
    """Two layers with the same weights over the same x."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 6).double(), nn.Linear(12, 6).double()
        self.two.load_state_dict(self.one.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


def test_masks_differ_between_layers_batches_and_jobs():
    data = [(torch.ones(3, 12, dtype=torch.float64), torch.zeros(3))] * 2
    seen: dict[str, list[Tensor]] = {}

    def loss(name: str, outputs: tuple[Tensor, Tensor], batch: object) -> Tensor:
        seen.setdefault(name, []).extend(y.detach().clone() for y in outputs)
        return 0 * (outputs[0].sum() + outputs[1].sum())  # the adapters stay as they are

    plain_sgd = partial(torch.optim.SGD, lr=1.0)
    config = LoRAConfig(r=2, lora_dropout=0.5)
    two = [Job(name, data, partial(loss, name), config, optimizer=plain_sgd, seed=i) for i, name in enumerate("ab")]
    jobs = Jobs(Twins(), two)
    with torch.no_grad():
        for name in "ab":
            for key, p in jobs.parameters(name).items():
                p.copy_(torch.arange(p.numel()).view(p.shape) + 1 if key.endswith("A") else torch.ones_like(p))
    jobs.step()
    jobs.step()
    outputs = [y for name in "ab" for y in seen[name]]
    assert len(outputs) == 8
    assert all(not torch.equal(outputs[i], outputs[j]) for i in range(8) for j in range(i))
    with torch.no_grad(), jobs.using("a"):
        one, other = jobs.model(data[0][0])
    assert torch.equal(one, other)


def test_the_seed_of_a_job_chooses_its_order_and_its_first_values():
    seen: dict[str, list[Tensor]] = {}

    def loss(name: str, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.setdefault(name, []).append(batch[0])
        return cross_entropy(outputs, batch)

    data = samples(12)
    seeds = {"a": 1, "b": 1, "c": 2}
    jobs = Jobs(classifier(), [Job(n, data, partial(loss, n), batch_size=4, seed=s, steps=6) for n, s in seeds.items()])
    first = {name: jobs.parameters(name)["one.lora_A"].detach().clone() for name in seeds}
    jobs.run()
    assert torch.equal(first["a"], first["b"]) and not torch.equal(first["a"], first["c"])
    order = {name: torch.cat(batches) for name, batches in seen.items()}
    assert torch.equal(order["a"], order["b"]) and not torch.equal(order["a"], order["c"])
    passes = order["a"].split(12)
    assert len(passes) == 2 and not torch.equal(*passes)
    for one in passes:  # each pass holds every sample once
        assert torch.equal(one.sort(0).values, torch.stack([x for x, _ in data]).sort(0).values)
