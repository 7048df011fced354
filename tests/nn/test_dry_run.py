"""A dry forward tells which adapters take part in it, and leaves the model and the random generators as they were."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.nn import dry_run
from lora_kernels.nn.dry_run import Inputs, Watched
from lora_kernels.nn.unchanged import unchanged

X = torch.randn(4, 8)


class Busy(nn.Module):
    """A model whose forward changes whatever a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = FusedLoRALinear(8, 8, lora_dropout=0.5), nn.BatchNorm1d(8)
        self.steps, self.seen, self.names, self.counts = 0, [], set(), Counter()
        self.register_buffer("total", torch.zeros(8))
        self.register_buffer("last", torch.zeros(8))
        self.plain = torch.ones(8)
        self.fail = False

    def forward(self, x):
        self.steps += 1
        self.seen.append(x)
        self.names.add(len(self.names))
        self.counts["calls"] += 1
        self.new = x
        self.total += x.sum(0)
        self.total.data.mul_(2)
        self.last = x[0]
        self.plain.add_(1)
        self.proj.bias.data.zero_()
        random.random(), np.random.rand()
        if self.fail:
            raise RuntimeError("half-way")
        return self.norm(F.dropout(self.proj(x), 0.5, self.training))


def state(model: Busy) -> list:
    kept = [t.clone() for t in (*model.state_dict().values(), model.plain, torch.get_rng_state())]
    own = [model.steps, [*model.seen], {*model.names}, {**model.counts}, sorted(vars(model))]
    return [*kept, *own, random.getstate(), np.random.get_state()[1].tolist(), [m.training for m in model.modules()]]


def equal(a: list, b: list) -> bool:
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def over(model: nn.Module, *args, **kwargs) -> dict[str, str]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FusedLoRALinear)}
    watched = {name: Watched(layer, [layer.weight], [layer.lora_A]) for name, layer in layers.items()}
    return dry_run.passed_over(model, watched, Inputs(args, kwargs))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fail", [True, False])
def test_nothing_of_the_model_changes(training, fail):
    model = Busy().train(training)
    model.norm.eval()  # frozen statistics are a mode of one module
    model.fail = fail
    before = state(model)
    if fail:
        with pytest.raises(RuntimeError, match="half-way"):
            over(model, X)
    else:
        assert over(model, X) == {}
    assert equal(state(model), before) and not model.proj._forward_pre_hooks
    model.fail = False
    model(X)
    assert not equal(state(model), before)  # the comparison sees what a forward changes


def test_other_objects_keep_their_attributes():
    class Group:
        calls = 0

    group = Group()
    with unchanged(nn.Linear(2, 2), [group]):
        group.calls += 1
    assert group.calls == 0


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        return x + torch.rand(2, generator=self.generator)


def test_a_generator_that_a_module_holds_is_as_before():
    model = Random()
    before = model.generator.get_state()
    with unchanged(model):
        model(torch.zeros(2))
    assert torch.equal(model.generator.get_state(), before)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        names = (
            "called",
            "read",
            "unused",
            "in_training",
            "in_evaluation",
            "elsewhere",
            "patched",
            "transposed",
            "cast",
        )
        for name in names:
            setattr(self, name, FusedLoRALinear(8, 8))
        self.patched.forward = lambda x: F.linear(x, self.patched.weight)

    def forward(self, x):
        x = F.linear(self.called(x), self.read.weight)
        x = self.in_training(x) if self.training else x @ self.in_training.weight
        x = x if self.training else self.in_evaluation(x)
        x = F.linear(F.linear(x, self.elsewhere.lora_A), self.elsewhere.lora_B) + F.linear(x, self.elsewhere.weight)
        x = self.patched(x) + x @ self.transposed.weight.detach().t()
        return self.cast(x.to(self.cast.weight.dtype))


def test_each_way_of_passing_over_an_adapter_is_told():
    assert over(Parts(), X) == {
        "read": "in training mode other code read its weight, past its adapter",
        "unused": "it was not called in a forward with these inputs",
        "in_training": "in evaluation mode other code read its weight, past its adapter",
        "elsewhere": "it was not called: other code computed its adapter",
        "patched": "in training mode its forward, which is patched, read its weight, past its adapter",
        "transposed": "in training mode other code read its weight, past its adapter",
    }


def test_a_tied_head_that_is_not_called_is_not_said_to_be_read():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(8, 8), FusedLoRALinear(8, 8, bias=False)
            self.emb.weight = self.head.weight

        def forward(self, ids, logits):
            x = self.emb(ids)
            return self.head(x) if logits else x

    ids = torch.arange(3)
    assert over(Tied(), ids, True) == {}
    assert over(Tied(), ids, False) == {"head": "it was not called in a forward with these inputs"}


@pytest.mark.parametrize("compiled", ["model", "block"])
def test_compiled_code_is_looked_at_too(compiled):
    model = Parts()
    if compiled == "model":
        found = {n.removeprefix("_orig_mod."): why for n, why in over(torch.compile(model, backend="eager"), X).items()}
    else:
        model.called = torch.compile(model.called, backend="eager")
        found = over(model, X)
        assert "called._orig_mod" not in found
    assert len(found) == 6


@pytest.mark.parametrize(
    ("given", "want"),
    [({"x": X}, ((), {"x": X})), ((X,), ((X,), {})), ([X], ((X,), {})), (X, ((X,), {}))],
)
def test_inputs_are_taken_as_a_mapping_a_sequence_or_one_argument(given, want):
    got = dry_run.inputs_for(nn.Linear(2, 2), given)
    assert [id(t) for t in (*got.args, *got.kwargs.values())] == [id(t) for t in (*want[0], *want[1].values())]
    assert got.kwargs.keys() == want[1].keys()


def test_a_model_without_dummy_inputs_needs_inputs():
    with pytest.raises(ValueError, match=r"no dummy_inputs: give inputs.*verify=batch"):
        dry_run.inputs_for(nn.Linear(2, 2), True)
