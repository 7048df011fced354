"""Jobs that train together have the losses and weights that they have alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from support.job_problems import Reader, classifier, cross_entropy, equal, job, losses, samples, weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.jobs import Job, Jobs, LoRAConfig


class Named(NamedTuple):
    y: Tensor
    z: None


@dataclass
class Held:
    y: Tensor
    z: None


def alone(model: nn.Module, one: Job, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    jobs = Jobs(model, [one])
    found = losses(jobs, steps)[one.name], weights(jobs, one.name)
    jobs.close()
    return found


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Adam divides by roots of squares, so a rounding of 1e-16 may grow, but not to 1e-9."""
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-9, atol=1e-11)


def test_four_jobs_together_equal_four_alone():
    model, four = classifier(), [job(i) for i in range(4)]
    jobs = Jobs(model, four)
    together = losses(jobs, 13)
    after = {one.name: weights(jobs, one.name) for one in four}
    assert {now.phase for now in jobs.progress().values()} == {"finished"}
    jobs.close()
    for one in four:
        own, values = alone(model, one, 13)
        assert together[one.name] == pytest.approx(own, rel=1e-9)
        assert len(own) == 6 * one.accumulation
        close(after[one.name], values)


def test_jobs_learn():
    how = {"config": LoRAConfig(r=8, lora_alpha=32), "batch_size": 24, "schedule": None, "accumulation": 1}
    jobs = Jobs(classifier(), [job(i, steps=60, max_grad_norm=None, **how) for i in range(2)])
    found = losses(jobs, 60)
    assert all(run[-1] < 0.5 * run[0] for run in found.values())


def test_a_job_that_joins_later_equals_itself_alone():
    model = classifier()
    jobs = Jobs(model, [job(0, steps=20)])
    losses(jobs, 3)
    jobs.add(job(1))
    together = losses(jobs, 4)["job 1"]
    after = weights(jobs, "job 1")
    jobs.close()
    own, values = alone(model, job(1), 4)
    assert together == pytest.approx(own, rel=1e-9)
    close(after, values)


@pytest.mark.parametrize("why", ["paused", "finished"])
def test_a_job_without_rows_keeps_every_bit(why):
    jobs = Jobs(classifier(), [job(0), job(1, steps=1, accumulation=1)])
    jobs.step()
    if why == "paused":
        jobs.remove("job 1")
        jobs.add(job(1, accumulation=1))
        jobs.step()
        jobs.pause("job 1")
    runner = jobs._runner("job 1")
    before, state = (
        weights(jobs, "job 1"),
        {k: v["exp_avg"].clone() for k, v in runner.optimizer.state_dict()["state"].items()},
    )
    assert "job 1" not in jobs.step()
    assert jobs.progress()["job 1"].phase == why
    assert equal(before, weights(jobs, "job 1"))
    assert all(p.grad is None for p in jobs.parameters("job 1").values())
    for k, v in runner.optimizer.state_dict()["state"].items():
        assert v["step"] == 1 and torch.equal(v["exp_avg"], state[k])


def test_a_paused_job_goes_on_with_its_next_batch():
    model = classifier()
    jobs = Jobs(model, [job(0), job(1)])
    first = losses(jobs, 3)["job 1"]
    jobs.pause("job 1")
    losses(jobs, 2)
    jobs.resume("job 1")
    together = first + losses(jobs, 3)["job 1"]
    jobs.close()
    assert together == pytest.approx(alone(model, job(1), 6)[0], rel=1e-9)


def sequences(i: int, length: int) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(i)
    ids = [torch.randint(20, (length,), generator=g) for _ in range(8)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each} for each in ids]


def next_token(outputs: Any, batch: Any) -> Tensor:
    logits, labels = outputs["logits"][:, :-1], batch["labels"][:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def test_dropout_does_not_depend_on_the_padding_that_longer_neighbours_cause():
    torch.manual_seed(0)
    model = Reader().double()
    config = LoRAConfig(r=4, lora_dropout=0.4)
    many = [
        Job(f"{length}", sequences(length, length), next_token, config, batch_size=2, seed=length, steps=4)
        for length in (9, 5, 7)
    ]
    jobs = Jobs(model, many)
    together = losses(jobs, 4)
    after = {one.name: weights(jobs, one.name) for one in many}
    jobs.close()
    for one in many:
        own, values = alone(model, one, 4)
        assert together[one.name] == pytest.approx(own, rel=1e-9)
        close(after[one.name], values)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = classifier(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant):
    jobs = Jobs(classifier(), [job(i) for i in range(3)])
    plain = losses(jobs, 4)
    after = [list(weights(jobs, f"job {i}").values()) for i in range(3)]
    again = Jobs(Checkpointed(reentrant), [job(i) for i in range(3)])
    assert losses(again, 4) == plain
    for i, values in enumerate(after):
        assert all(map(torch.equal, values, weights(again, f"job {i}").values()))


def test_jobs_may_adapt_different_layers():
    model = classifier()
    configs = [LoRAConfig(r=2, target_modules=["one"]), LoRAConfig(r=2, target_modules=["two", "head"])]
    jobs = Jobs(model, [job(i, config=config) for i, config in enumerate(configs)])
    together = losses(jobs, 4)
    assert [list(jobs.parameters(f"job {i}")) for i in range(2)] == [
        ["one.lora_A", "one.lora_B"],
        ["two.lora_A", "two.lora_B", "head.lora_A", "head.lora_B"],
    ]
    jobs.close()
    for i, config in enumerate(configs):
        assert together[f"job {i}"] == pytest.approx(alone(model, job(i, config=config), 4)[0], rel=1e-9)


def test_the_global_random_numbers_play_no_part():
    model = classifier()
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        jobs = Jobs(model, [job(1)])
        torch.rand(seed)
        found.append((losses(jobs, 4), list(weights(jobs, "job 1").values())))
        jobs.close()
    assert found[0][0] == found[1][0] and all(map(torch.equal, found[0][1], found[1][1]))


@pytest.mark.parametrize("kind", [tuple, list, Named, Held, lambda *each: dict(zip("yz", each, strict=True))])
def test_outputs_of_every_kind_are_taken_apart(kind):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier()

        def forward(self, x: Tensor) -> Any:
            y = self.inner(x)
            return kind([y, None]) if kind in (tuple, list) else kind(y, None)

    def loss(outputs: Any, batch: Any) -> Tensor:
        assert kind in (Named, Held, tuple, list) or isinstance(outputs, dict)
        y = outputs.y if kind in (Named, Held) else outputs["y"] if isinstance(outputs, dict) else outputs[0]
        return cross_entropy(y, batch)

    plain = losses(Jobs(classifier(), [job(i) for i in range(2)]), 2)
    assert losses(Jobs(Model(), [replace(job(i), loss=loss) for i in range(2)]), 2) == plain


@pytest.mark.slow
def test_a_compiled_model_trains_the_same_jobs_without_a_new_program_for_each_batch():
    torch._dynamo.reset()
    model = classifier(torch.float32)
    four = [job(i, dtype=torch.float32) for i in range(4)]
    jobs = Jobs(model, four)
    jobs.model = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    compiled = losses(jobs, 13)
    assert compiled == losses(Jobs(classifier(torch.float32), four), 13)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_batches_of_an_iterable_are_taken_in_their_order():
    data = [tuple(torch.stack(each) for each in zip(*samples(3, seed=i), strict=True)) for i in range(5)]
    seen: list[Tensor] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        seen.append(batch[0])
        return cross_entropy(outputs, batch)

    jobs = Jobs(classifier(), [Job("one pass", data, loss), Job("steps", data, cross_entropy, steps=12)])
    jobs.run()
    assert [now.step for now in jobs.progress().values()] == [5, 12]
    assert all(map(torch.equal, seen, (batch[0] for batch in data)))
    jobs.add(Job("generator", iter(data), cross_entropy, steps=12))
    jobs.run()
    assert jobs.progress()["generator"].step == 5 and jobs.progress()["generator"].phase == "finished"
