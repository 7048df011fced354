"""What would make a job depend on its neighbours is refused, with the way out, and nothing is trained."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.job_problems import Reader, classifier, cross_entropy, equal, job, losses, samples, weights
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear, apply_lora
from lora_kernels.jobs import Job, Jobs, LoRAConfig


class Around(nn.Module):
    """The classifier with something else behind or around it."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.inner = classifier()
        self.more = nn.ModuleDict(modules)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        for module in self.more.values():
            y = module(y)
        return y


class Mean(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y - y.mean(0)


class Attention(nn.Module):
    """Attention over the samples of the batch."""

    def forward(self, y: Tensor) -> Tensor:
        return torch.softmax(y @ y.T, -1) @ y


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.BatchNorm1d(4), "more.m (batch norm, whose statistics are those of all rows)"),
        (nn.BatchNorm1d(4, track_running_stats=False).eval(), "more.m (batch norm"),
        (nn.Dropout(0.25), "more.m (dropout with p = 0.25, one mask for all rows)"),
        (nn.MultiheadAttention(4, 2, dropout=0.5), "more.m (dropout = 0.5, drawn for all rows at once)"),
    ],
)
def test_modules_that_draw_or_count_for_the_whole_batch(module, text):
    jobs = Jobs(Around(m=module.double()), [job(0), job(1)])
    with pytest.raises(ValueError, match=re.escape(text)):
        jobs.step()
    assert jobs.progress()["job 0"].loss is None


def test_the_same_modules_in_evaluation_mode_are_served():
    model = Around(a=nn.BatchNorm1d(4).double(), b=nn.Dropout(0.25)).eval()
    jobs = Jobs(model, [job(1), job(2)])
    together = losses(jobs, 3)
    jobs.close()
    for i in (1, 2):
        assert together[f"job {i}"] == pytest.approx(losses(Jobs(Around(**model.more).eval(), [job(i)]), 3)[f"job {i}"])


@pytest.mark.parametrize("module", [Mean(), Attention()])
def test_a_model_that_mixes_rows_is_found_by_a_trial_backward(module):
    jobs = Jobs(Around(m=module), [job(0), job(1)])
    before = weights(jobs, "job 0")
    with pytest.raises(ValueError, match="the loss of job 'job 0' depends on the adapter of 'job 1'"):
        jobs.step()
    assert equal(before, weights(jobs, "job 0"))
    assert all(p.grad is None for name in ("job 0", "job 1") for p in jobs.parameters(name).values())


def test_a_batch_that_is_not_the_first_dimension_is_found_too():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier()

        def forward(self, x: Tensor) -> Tensor:  # x [B, S, K] with B = S
            return self.inner(x.transpose(0, 1)).transpose(0, 1).mean(1)

    data = [(torch.randn(4, 12, dtype=torch.float64), torch.tensor(1)) for _ in range(8)]
    two = [Job(f"{i}", data, cross_entropy, batch_size=2, seed=i) for i in range(2)]
    with pytest.raises(ValueError, match="the model mixes rows"):
        Jobs(Turned(), two).step()


def test_accumulated_gradients_outlive_the_trial():
    jobs = Jobs(classifier(), [job(1, accumulation=3)])
    jobs.step()
    before = {key: p.grad.clone() for key, p in jobs.parameters("job 1").items()}
    jobs.add(job(0))
    jobs.pause("job 1")
    jobs.resume("job 1")
    jobs.step()
    alone = Jobs(classifier(), [job(1, accumulation=3)])
    losses(alone, 2)
    for key, p in jobs.parameters("job 1").items():
        torch.testing.assert_close(p.grad, alone.parameters("job 1")[key].grad)
        assert key.endswith("lora_A") or not torch.equal(p.grad, before[key])


def test_a_base_that_is_trained():
    jobs = Jobs(classifier(), [job(0)])
    jobs.model.head.bias.requires_grad_()
    with pytest.raises(ValueError, match=r"these parameters of the base require a gradient: head\.base_layer\.bias"):
        jobs.step()


def test_outputs_of_the_whole_batch():
    class Router(Around):
        def forward(self, x: Tensor) -> Any:
            return {"logits": self.inner(x), "aux_loss": x.sum()}

    def loss(outputs: Any, batch: Any) -> Tensor:
        return cross_entropy(outputs["logits"], batch)

    jobs = Jobs(Router(), [replace(job(0), loss=loss)])
    with pytest.raises(
        ValueError, match=r"the output\['aux_loss'\] has shape \(\).*mixes the jobs.*output_router_logits"
    ):
        jobs.step()
    jobs.close()
    fit = Jobs(Router(), [replace(job(0), loss=loss)], call=lambda model, batch: {"logits": model(batch[0])["logits"]})
    assert fit.step()["job 0"].loss is not None


def test_outputs_whose_rows_cannot_be_told():
    class Odd(Around):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=self.inner(x))

    with pytest.raises(TypeError, match=r"the model returned a SimpleNamespace.*pick the outputs in `call`"):
        Jobs(Odd(), [replace(job(0), loss=lambda o, b: cross_entropy(o.logits, b))]).step()


def test_layers_that_get_a_choice_of_the_rows():
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.expert = classifier(), nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            chosen = torch.arange(len(y)) % 3 == 0
            return y.index_put((chosen,), self.expert(y[chosen]))

    with pytest.raises(ValueError, match=r"got x \(3, 4\), which does not have a row for each of the 7 samples"):
        Jobs(Expert(), [job(0), job(1)]).step()
    left_out = LoRAConfig(exclude_modules=["expert"])
    Jobs(Expert(), [job(0, config=left_out), job(1, config=left_out)]).step()


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ([(torch.randn(13).double(), torch.tensor(0))], "the field 0 of the batches does not fit together"),
        ([(torch.randn(12), torch.tensor(0))], "torch.float32"),
        ([{"x": torch.randn(12)}], "must have the same fields"),
        (
            [(torch.randn(12).double(), "text")],
            r"a batch must be a tensor, or a tuple or mapping of tensors, and has 1",
        ),
    ],
)
def test_batches_that_do_not_fit_together_are_kept_for_the_next_step(other, text):
    jobs = Jobs(classifier(), [job(0), Job("other", other, cross_entropy, batch_size=1)])
    with pytest.raises((ValueError, TypeError), match=text):
        jobs.step()
    with pytest.raises(ValueError, match="has a batch that it has not learnt from"):
        jobs.save("job 0", "nowhere")
    jobs.remove("other")
    assert losses(jobs, 4) == losses(Jobs(classifier(), [job(0)]), 4)


def test_padding_without_a_mask():
    def sequences(length: int) -> list[dict[str, Tensor]]:
        return [{"input_ids": torch.randint(20, (length,))} for _ in range(4)]

    two = [Job(f"{n}", sequences(n), lambda o, b: o["logits"].sum(), batch_size=2) for n in (5, 8)]
    jobs = Jobs(Reader(), two, call=lambda model, batch: model(batch["input_ids"], torch.ones_like(batch["input_ids"])))
    with pytest.raises(ValueError, match="padded to 8 tokens, and the batches have no attention_mask"):
        jobs.step()


def test_lengths_that_a_layer_could_not_tell_apart():
    def samples_of(one: int) -> list[dict[str, Tensor]]:
        mask = torch.ones(one, dtype=torch.long)
        return [{"input_ids": mask, "attention_mask": mask, "other": torch.ones(6)} for _ in range(4)]

    two = [Job(f"{n}", samples_of(n), cross_entropy, batch_size=2) for n in (4, 6)]
    with pytest.raises(ValueError, match="two fields of the batch are padded to the length 6 from different lengths"):
        Jobs(classifier(), two).step()


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda o, b: o.sum(1), r"must be a tensor of one number, got \(3,\)"),
        (lambda o, b: 1.0, "must be a tensor of one number, got a float"),
        (lambda o, b: o.detach().sum(), "does not depend on its adapter"),
    ],
)
def test_losses_that_are_none(loss, text):
    with pytest.raises(ValueError, match=text):
        Jobs(classifier(), [replace(job(0), loss=loss)]).step()


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"name": ""}, ValueError, "name of a job"),
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
        ({"accumulation": 1.5}, ValueError, "accumulation"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be a positive number"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite"),
        ({"config": {"r": 8}}, TypeError, "must be a lora_kernels.jobs.LoRAConfig, got a dict"),
        ({"config": LoRAConfig(r=0)}, ValueError, "r must be an integer of at least 1"),
        ({"config": LoRAConfig(lora_dropout=1.0)}, ValueError, "lora_dropout"),
        ({"config": LoRAConfig(target_modules=["none"])}, ValueError, "match no layer"),
        ({"data": []}, ValueError, "has no samples"),
        ({"data": iter([])}, TypeError, "must be a dataset"),
        ({"data": 3, "batch_size": None}, TypeError, "must be an iterable of batches"),
        ({"name": "job 0"}, ValueError, "there is a job 'job 0' already"),
        (
            {"optimizer": lambda p: torch.optim.SGD([nn.Parameter(torch.ones(1))])},
            ValueError,
            "not those of its adapter",
        ),
    ],
)
def test_jobs_that_cannot_be_are_refused_and_nothing_changes(changed, error, text):
    jobs = Jobs(classifier(), [job(0)])
    before = repr(jobs.model)
    with pytest.raises(error, match=text):
        jobs.add(replace(job(1), **changed))
    assert repr(jobs.model) == before and list(jobs.progress()) == ["job 0"]
    jobs.step()


def test_models_with_adapters_already():
    adapted = classifier()
    apply_lora(adapted)
    with pytest.raises(ValueError, match="has layers with adapters already"):
        Jobs(adapted, [job(0)])
    assert isinstance(adapted.one, FusedLoRALinear) and adapted.one.lora_A.requires_grad
    peft = pytest.importorskip("peft")
    of_peft = peft.get_peft_model(classifier(), peft.LoraConfig(target_modules=["one"]))
    with pytest.raises(ValueError, match=r"has layers of PEFT .*take model\.unload\(\)"):
        Jobs(of_peft, [job(0)])
    with pytest.raises(ValueError, match="nowhere"):
        Jobs(classifier(), backend="nowhere")
    taken = Jobs(classifier(), [job(0)])
    with pytest.raises(ValueError, match="belongs to another Jobs"):
        Jobs(taken.model)


def test_unknown_names():
    jobs = Jobs(classifier(), [job(0)])
    for ask in (jobs.remove, jobs.pause, jobs.using, jobs.parameters):
        with pytest.raises(KeyError, match="there is no job 'nobody'; there are 'job 0'"):
            ask("nobody")
    with pytest.raises(ValueError, match="is not paused"):
        jobs.resume("job 0")


def test_data_that_raise_cost_the_others_no_batch():
    def failing():
        yield tuple(torch.stack(each) for each in zip(*samples(2), strict=True))
        raise OSError("the disk is gone")

    jobs = Jobs(classifier(), [job(0), Job("failing", failing(), cross_entropy)])
    first = losses(jobs, 1)["job 0"]
    with pytest.raises(OSError, match="the disk is gone"):
        jobs.step()
    jobs.remove("failing")
    together = first + losses(jobs, 3)["job 0"]
    assert together == pytest.approx(losses(Jobs(classifier(), [job(0)]), 4)["job 0"], rel=1e-12)
