"""What a model with jobs computes outside of their steps, and how it gets back to what it was."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from support.job_problems import Classifier, classifier, equal, job, losses, weights
from torch import nn

from lora_kernels import QuantizedLoRALinear, apply_lora
from lora_kernels.jobs import Jobs, LoRAConfig
from lora_kernels.nn.mixed import mixed, table_of

CONFIG = LoRAConfig(r=4, lora_dropout=0.5)


@pytest.fixture
def jobs() -> Jobs:
    made = Jobs(classifier(), [job(i, config=CONFIG) for i in range(2)])
    losses(made, 3)
    return made


def quantised() -> Classifier:
    model = classifier(torch.float32)
    apply_lora(model, r=1, quant="nf4", target_modules=["one", "two"])
    return model


X = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_without_a_context_the_model_is_the_base_bit_by_bit(jobs):
    y = jobs.model(X)
    assert torch.equal(y, classifier()(X)) and not y.requires_grad


def test_using_computes_with_one_adapter_and_without_dropout(jobs):
    with torch.no_grad(), jobs.using("job 1"):
        y, again = jobs.model.train()(X), jobs.model.eval()(X)
    assert torch.equal(y, again)
    merged = classifier()
    for name, p in jobs.parameters("job 1").items():
        if name.endswith("lora_A"):
            layer, b = name.removesuffix(".lora_A"), jobs.parameters("job 1")[name.replace("lora_A", "lora_B")]
            merged.get_submodule(layer).weight.data += CONFIG.lora_alpha / CONFIG.r * (b @ p).detach()
    torch.testing.assert_close(y, merged(X))
    assert not torch.allclose(y, jobs.model(X))


def test_mixed_takes_a_job_for_each_sample(jobs):
    names = ["job 1", None, "job 0", "job 1", None, "job 0"]
    with torch.no_grad():
        with mixed(jobs.model, names):
            y = jobs.model(X)
        for name in ("job 0", "job 1"):
            with jobs.using(name):
                own = jobs.model(X)
            rows = [i for i, each in enumerate(names) if each == name]
            torch.testing.assert_close(y[rows], own[rows])
        torch.testing.assert_close(y[[1, 4]], jobs.model(X)[[1, 4]])
    assert table_of(jobs.model) == {"job 0": 0, "job 1": 1}


def test_another_thread_computes_the_base_in_the_meantime(jobs):
    found = []
    with torch.no_grad(), jobs.using("job 1"):
        thread = threading.Thread(target=lambda: found.append(jobs.model(X)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], classifier()(X))


def test_close_and_the_last_remove_restore_the_model():
    model = classifier()
    model.one.weight.requires_grad = False
    layers, trained = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for end in ("close", "remove"):
        jobs = Jobs(model, [job(0), job(1, config=LoRAConfig(target_modules=["one"]))])
        assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)
        losses(jobs, 2)
        if end == "remove":
            jobs.remove("job 0")
            assert type(model.two) is nn.Linear and type(model.one) is not nn.Linear
            jobs.remove("job 1")
            assert dict(model.named_modules()) == layers
        jobs.close()
        assert dict(model.named_modules()) == layers
        assert [p.requires_grad for p in model.parameters()] == trained
        assert equal(state, model.state_dict())


def test_a_removed_job_changes_nothing_for_the_others():
    jobs = Jobs(classifier(), [job(i) for i in range(3)])
    first = losses(jobs, 2)
    jobs.remove("job 1")
    rest = losses(jobs, 3)
    alone = Jobs(classifier(), [job(2)])
    assert first["job 2"] + rest["job 2"] == pytest.approx(losses(alone, 5)["job 2"], rel=1e-9)


def test_quantised_bases_are_served():
    model = quantised()
    x = X.float()
    base = model(x)
    two = [job(i, dtype=torch.float32, config=CONFIG) for i in range(2)]
    jobs = Jobs(model, two)
    assert torch.equal(jobs.model(x), base)
    codes = {key: value.clone() for key, value in model.state_dict().items() if ".base_layer." in key}
    together = losses(jobs, 4)
    assert equal(codes, {key: value for key, value in model.state_dict().items() if key in codes})
    assert set(jobs.parameters("job 0")) == {f"{name}.lora_{part}" for name in ("one", "two", "head") for part in "AB"}
    with torch.no_grad(), mixed(model, ["job 0"] * 6):
        y = model(x)
    with torch.no_grad(), jobs.using("job 0"):
        torch.testing.assert_close(model(x), y)
    jobs.close()
    assert isinstance(model.one, QuantizedLoRALinear) and torch.equal(model(x), base)
    for one in two:
        assert together[one.name] == pytest.approx(losses(Jobs(quantised(), [one]), 4)[one.name], rel=1e-3)


def test_a_quantised_layer_with_a_trained_adapter_is_refused():
    model = quantised()
    nn.init.ones_(model.two.lora_B)
    with pytest.raises(ValueError, match=r"these quantised layers have a trained or merged adapter.*two"):
        Jobs(model)


def test_adapters_are_in_fp32_beside_bf16_unless_told_otherwise():
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = classifier(torch.bfloat16)
        jobs = Jobs(model, [job(i, dtype=torch.bfloat16) for i in range(2)], adapter_dtype=dtype)
        assert {p.dtype for p in jobs.parameters("job 0").values()} == {expected}
        assert losses(jobs, 2)["job 1"]


def test_autocast_is_obeyed():
    jobs = Jobs(classifier(torch.float32), [job(i, dtype=torch.float32) for i in range(2)])
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(jobs, 2)
    plain = losses(Jobs(classifier(torch.float32), [job(i, dtype=torch.float32) for i in range(2)]), 2)
    assert found["job 0"] == pytest.approx(plain["job 0"], rel=0.02) and found != plain


def test_a_model_with_jobs_is_copied_and_moved_whole(jobs):
    other = copy.deepcopy(jobs.model)
    assert all(map(torch.equal, other.parameters(), jobs.model.parameters()))
    with torch.no_grad(), mixed(other, ["job 1"] * 6):
        y = other(X)
    with torch.no_grad(), jobs.using("job 1"):
        assert torch.equal(jobs.model(X), y)


def test_layers_at_several_places_and_tied_weights_share_their_adapter_or_not():
    class Twice(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.two  # the same layer
            self.tied = nn.Linear(16, 16, bias=False)
            self.tied.weight = self.two.weight  # another layer with the same weight

        def forward(self, x):
            return self.head(self.tied(self.again(self.two(self.one(x)))))

    torch.manual_seed(0)
    model = Twice().double()
    jobs = Jobs(model, [job(0), job(1)])
    assert model.again is model.two and model.tied is not model.two
    assert model.tied.base_layer.weight is model.two.base_layer.weight
    found = losses(jobs, 3)
    jobs.close()
    assert model.again is model.two and type(model.two) is nn.Linear
    assert found["job 0"] == pytest.approx(losses(Jobs(model, [job(0)]), 3)["job 0"], rel=1e-9)


def test_run_goes_on_until_the_jobs_end_and_shows_a_table(capsys):
    pytest.importorskip("rich")
    from rich.console import Console

    jobs = Jobs(classifier(), [job(0, name="[red]a", steps=3), job(1, steps=2)])
    assert jobs.run(1)["[red]a"].step == 1
    assert {now.phase for now in jobs.run(show=True).values()} == {"finished"}
    assert "finished" in capsys.readouterr().out
    out = io.StringIO()
    Console(file=out, width=120).print(jobs.table())
    lines = out.getvalue().splitlines()
    assert "[red]a" in lines[3] and "3/3" in lines[3] and "2/2" in lines[4]
    assert f"{jobs.progress()['job 1'].loss:.4g}" in lines[4]


def test_the_base_gets_no_gradient(jobs):
    assert all(p.grad is None for name, p in jobs.model.named_parameters() if "lora_" not in name)
    assert not equal(weights(jobs, "job 0"), weights(jobs, "job 1"))
