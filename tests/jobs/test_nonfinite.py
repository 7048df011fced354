"""A job whose loss or gradient is not finite harms no other job, and its own adapter stays as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.job_problems import classifier, cross_entropy, equal, job, losses, samples, weights

from lora_kernels.jobs import Jobs, LoRAConfig

CONFIG = LoRAConfig(r=4, lora_dropout=0.2)
HOW = {"config": CONFIG, "batch_size": 4, "accumulation": 1, "dtype": torch.float32}


def others(jobs: Jobs) -> dict[str, torch.Tensor]:
    return {f"{name} {key}": value for name in ("job 0", "job 2") for key, value in weights(jobs, name).items()}


@pytest.fixture
def clean() -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """The losses and weights of jobs 0 and 2 beside a job 1 without faults, in fp32, where a bit is soon lost."""
    jobs = Jobs(classifier(torch.float32), [job(i, **HOW) for i in range(3)])
    found = losses(jobs, 3)
    return {name: found[name] for name in ("job 0", "job 2")}, others(jobs)


def broken(kind: str):
    """A loss that is not finite from its second call on."""
    calls = []

    def loss(outputs, batch):
        calls.append(1)
        value = cross_entropy(outputs, batch)
        if len(calls) < 2:
            return value
        if kind == "nan loss":
            return value * math.nan
        if kind == "inf loss":
            return value / 0
        return value + 0 * torch.sqrt(outputs.sum() - outputs.sum().detach())  # finite, with an infinite gradient

    return loss


@pytest.mark.parametrize("kind", ["nan loss", "inf loss", "nan gradient"])
@pytest.mark.parametrize("policy", ["pause", "drop"])
def test_the_other_jobs_keep_every_bit(clean, kind, policy):
    faulty = job(1, **HOW, on_nonfinite=policy)
    faulty = replace(faulty, loss=broken(kind))
    jobs = Jobs(classifier(torch.float32), [job(0, **HOW), faulty, job(2, **HOW)])
    found = losses(jobs, 1)
    before = weights(jobs, "job 1")
    now = jobs.step()
    assert now["job 1"].phase == ("paused" if policy == "pause" else "dropped")
    assert ("gradient" if kind == "nan gradient" else "loss") in now["job 1"].reason
    # The other jobs of the reference have a neighbour in this step too, so the base's products have the same rows.
    assert {name: now[name].loss for name in clean[0]} == {name: run[1] for name, run in clean[0].items()}
    if policy == "drop":
        assert list(jobs.progress()) == ["job 0", "job 2"]
        return
    assert equal(before, weights(jobs, "job 1"))
    assert all(p.grad is None for p in jobs.parameters("job 1").values())
    jobs._runner("job 1").job = job(1, **HOW)  # the fault is repaired
    jobs.resume("job 1")
    found = losses(jobs, 1)
    assert {name: found[name][0] for name in clean[0]} == {name: run[2] for name, run in clean[0].items()}
    assert equal(others(jobs), clean[1])
    assert not equal(before, weights(jobs, "job 1"))


def test_rows_that_are_nan_themselves_reach_no_other_job(clean):
    data = samples(seed=1, dtype=torch.float32)
    jobs = Jobs(classifier(torch.float32), [job(0, **HOW), job(1, **HOW), job(2, **HOW)])
    poisoned = [(x * math.nan, label) for x, label in data]
    losses(jobs, 1)
    jobs._runner("job 1").job.data[:] = poisoned
    now = jobs.step()
    assert now["job 1"].phase == "paused" and math.isnan(now["job 1"].loss)
    assert {name: now[name].loss for name in clean[0]} == {name: run[1] for name, run in clean[0].items()}
    assert all(value.isfinite().all() for value in others(jobs).values())


def test_an_infinite_weight_of_one_adapter_reaches_no_other_job(clean):
    jobs = Jobs(classifier(torch.float32), [job(i, **HOW) for i in range(3)])
    losses(jobs, 1)
    with torch.no_grad():
        jobs.parameters("job 1")["one.lora_B"].fill_(math.inf)
    now = jobs.step()
    assert now["job 1"].phase == "paused"
    after_two = Jobs(classifier(torch.float32), [job(i, **HOW) for i in range(3)])
    losses(after_two, 2)
    assert equal(others(jobs), others(after_two))


def test_accumulated_gradients_are_forgotten_with_the_batch():
    faulty = job(1, accumulation=3)
    faulty = replace(faulty, loss=broken("nan loss"))
    jobs = Jobs(classifier(), [job(0), faulty])
    losses(jobs, 2)
    assert jobs.progress()["job 1"].phase == "paused"
    assert jobs._runner("job 1").micro == 0
    assert all(p.grad is None for p in jobs.parameters("job 1").values())
