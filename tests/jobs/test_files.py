"""A saved job goes on as if it had never stopped, and other programs read its adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.job_problems import classifier, cross_entropy, equal, job, losses, samples, weights
from torch.optim import lr_scheduler

from lora_kernels import load_adapter
from lora_kernels.jobs import Job, Jobs, LoRAConfig


def resumed(one: Job, saved_after: int, steps: int, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train a job beside another, save it on the way, and go on in a new model beside a third job."""
    jobs = Jobs(classifier(), [job(0), one])
    found = losses(jobs, saved_after)[one.name]
    jobs.save(one.name, folder)
    again = Jobs(classifier(), [job(2)])
    again.add(one, resume=folder)
    return found + losses(again, steps - saved_after)[one.name], weights(again, one.name)


SCHEDULES = {
    "steps": partial(lr_scheduler.MultiStepLR, milestones=[1, 4], gamma=0.5),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=5),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=30),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "none": None,
}
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.02, amsgrad=True),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adafactor": partial(torch.optim.Adafactor, lr=0.05),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_job_goes_on_bit_by_bit(schedule, tmp_path):
    one = job(1, schedule=SCHEDULES[schedule], steps=30, accumulation=2)
    jobs = Jobs(classifier(), [job(0), one])
    found = losses(jobs, 9)[one.name]
    again, values = resumed(one, 5, 9, tmp_path)  # in the middle of a window of two batches
    assert again == pytest.approx(found, rel=1e-12)
    for key, value in weights(jobs, one.name).items():
        torch.testing.assert_close(values[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_job_alone_goes_on_bit_by_bit_with_other_optimisers(optimizer, tmp_path):
    one = job(1, optimizer=OPTIMIZERS[optimizer], steps=30)
    jobs = Jobs(classifier(), [one])
    losses(jobs, 4)
    jobs.save(one.name, tmp_path)
    rest = losses(jobs, 7)
    again = Jobs(classifier())
    again.add(one, resume=tmp_path)
    assert losses(again, 7) == rest
    assert equal(weights(again, one.name), weights(jobs, one.name))
    assert again.progress() == jobs.progress()


def test_the_middle_of_a_pass_over_samples_is_found_again(tmp_path):
    one = replace(job(1), data=samples(7, dtype=torch.float64), batch_size=3, steps=None)
    jobs = Jobs(classifier(), [one])
    losses(jobs, 2)
    jobs.save(one.name, tmp_path)
    again = Jobs(classifier())
    again.add(one, resume=tmp_path)
    assert losses(again, 3) == losses(jobs, 3)
    assert again.progress()[one.name].phase == jobs.progress()[one.name].phase == "finished"


class Telling:
    """An iterable that knows its place."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self):
        while self.place < 6:
            self.place += 1
            yield tuple(torch.stack(each) for each in zip(*samples(3, seed=self.place), strict=True))

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


@pytest.mark.parametrize("tells", [False, True])
def test_the_place_in_an_iterable_is_found_again(tells, tmp_path):
    def data():
        return Telling() if tells else list(Telling())

    jobs = Jobs(classifier(), [Job("a", data(), cross_entropy)])
    losses(jobs, 2)
    jobs.save("a", tmp_path)
    again = Jobs(classifier())
    again.add(Job("a", data(), cross_entropy), resume=tmp_path)
    assert losses(again, 9) == losses(jobs, 9)
    assert again.progress()["a"].step == 6


def test_a_finished_job_goes_on_with_more_steps(tmp_path):
    jobs = Jobs(classifier(), [job(0, steps=2)])
    jobs.run()
    jobs.save("job 0", tmp_path)
    again = Jobs(classifier())
    again.add(job(0, steps=5), resume=tmp_path)
    again.run()
    whole = Jobs(classifier(), [job(0, steps=5)])
    whole.run()
    assert equal(weights(again, "job 0"), weights(whole, "job 0"))


def test_load_adapter_and_peft_read_the_adapter(tmp_path):
    config = LoRAConfig(r=4, rank_pattern={"two": 2}, use_rslora=True, target_modules=["one", "two"])
    jobs = Jobs(classifier(), [job(0), job(1, config=config)])
    losses(jobs, 3)
    jobs.save("job 1", tmp_path)
    x = torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad(), jobs.using("job 1"):
        y = jobs.model(x)
    plain = classifier()
    load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(x), y)
    peft = pytest.importorskip("peft")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(classifier(), tmp_path).double()(x), y)


@pytest.mark.parametrize("file", ["job.json", "job.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "missing", "of another job"])
def test_damaged_files_change_nothing(file, damage, tmp_path):
    jobs = Jobs(classifier(), [job(0), job(1), job(2)])
    losses(jobs, 2)
    jobs.save("job 1", tmp_path)
    path = tmp_path / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "missing":
        path.unlink()
    else:
        jobs.save("job 2", tmp_path / "other")
        path.write_bytes((tmp_path / "other" / file).read_bytes())
        if file == "job.json":
            state = json.loads(path.read_text())
            state["data"]["samples"] = 5
            path.write_text(json.dumps(state))
    model = classifier()
    again = Jobs(model, [job(0)])
    before = [name for name, _ in model.named_modules()], weights(again, "job 0")
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
        again.add(job(1), resume=tmp_path)
    assert [name for name, _ in model.named_modules()] == before[0]
    assert list(again.progress()) == ["job 0"] and equal(weights(again, "job 0"), before[1])


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"config": LoRAConfig(r=3)}, "another rank"),
        ({"config": LoRAConfig(r=8, target_modules=["one"])}, "other layers than those that config chooses: head"),
        ({"schedule": partial(lr_scheduler.ConstantLR)}, "has a schedule"),
        ({"data": samples(9)}, "saved with 24 samples, and its dataset has 9"),
    ],
)
def test_the_state_of_a_job_that_is_set_up_otherwise_is_refused(changed, text, tmp_path):
    jobs = Jobs(classifier(), [job(1)])
    losses(jobs, 2)
    jobs.save("job 1", tmp_path)
    with pytest.raises(ValueError, match=text):
        Jobs(classifier()).add(replace(job(1), **changed), resume=tmp_path)


def test_what_would_have_to_be_pickled_is_refused_and_nothing_is_written(tmp_path):
    class Schedule(lr_scheduler.ConstantLR):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            self.odd = object()

    jobs = Jobs(classifier(), [job(0, schedule=Schedule)])
    with pytest.raises(ValueError, match=r"schedule.odd of its state is a object.*nothing is pickled"):
        jobs.save("job 0", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_files_hold_no_base_and_no_pickle(tmp_path):
    jobs = Jobs(classifier(), [job(0)])
    losses(jobs, 1)
    jobs.save("job 0", tmp_path)
    names = {"adapter_config.json", "adapter_model.safetensors", "job.json", "job.safetensors"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} >= names
    from safetensors.torch import load_file

    assert {key.rpartition(".lora_")[0] for key in load_file(tmp_path / "adapter_model.safetensors")} == {
        f"base_model.model.{name}" for name in ("one", "two", "head")
    }
