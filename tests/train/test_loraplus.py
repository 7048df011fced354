"""`loraplus_groups` gives each trained parameter the learning rate of what it is."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from support.frozen_models import TIED, tied_llama
from support.kind_models import KIND_MODELS
from torch import Tensor, nn

import lora_kernels
from lora_kernels import FusedLoRALinear, apply_lora, apply_vera
from lora_kernels.analysis import analyse
from lora_kernels.train import freeze_a, loraplus_groups, restart

peft = pytest.importorskip("peft")

LR, RATIO = 1e-2, 16.0


class Net(nn.Module):
    """An embedding, a linear layer, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(10, 6), nn.Linear(6, 5)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.table(ids))))


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Return the names of the parameters of each group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def assert_each_trained_once(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_one_step_of_sgd_moves_b_by_ratio_times_the_learning_rate() -> None:
    torch.manual_seed(0)
    w = torch.randn(7, 5, dtype=torch.float64)
    layer = FusedLoRALinear.from_linear(nn.Linear(5, 7, dtype=torch.float64), r=3, lora_alpha=6)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.weight.copy_(w)
    x, dy = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    optimizer = torch.optim.SGD(loraplus_groups(layer, LR, RATIO))
    layer(x).backward(dy)
    optimizer.step()
    s = 2.0
    torch.testing.assert_close(layer.lora_A, a - LR * s * (dy @ b).T @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.lora_B, b - LR * RATIO * s * dy.T @ (x @ a.T), rtol=1e-12, atol=1e-12)


def test_the_first_step_of_adam_moves_every_element_by_its_learning_rate() -> None:
    layer = FusedLoRALinear.from_linear(nn.Linear(5, 7, dtype=torch.float64), r=3)
    with torch.no_grad():
        layer.lora_B.normal_()
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    optimizer = torch.optim.Adam(loraplus_groups(layer, LR, RATIO), eps=0.0)
    layer(torch.randn(9, 5, dtype=torch.float64)).square().sum().backward()
    ga, gb = layer.lora_A.grad, layer.lora_B.grad
    optimizer.step()
    torch.testing.assert_close(layer.lora_A, a - LR * ga.sign())
    torch.testing.assert_close(layer.lora_B, b - LR * RATIO * gb.sign())


def test_what_is_no_a_or_b_of_a_linear_layer_stays_at_the_learning_rate() -> None:
    model = Net()
    apply_lora(model, r=2, target_modules=["table", "up"], use_dora=True)
    for part in (model.norm, model.head):
        part.requires_grad_(True)
    groups = loraplus_groups(model, LR, RATIO, weight_decay=0.1, embedding_lr=1e-3)
    assert names_of(model, groups) == {
        "A": {"up.lora_A"},
        "B": {"up.lora_B"},
        "embedding": {"table.lora_embedding_A", "table.lora_embedding_B"},
        "other": {"head.weight"},
        "not decayed": {
            "table.lora_magnitude_vector", "up.lora_magnitude_vector", "norm.weight", "norm.bias", "head.bias",
        },
    }  # fmt: skip
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "A": (LR, 0.1), "B": (LR * RATIO, 0.1), "embedding": (1e-3, 0.1), "other": (LR, 0.1), "not decayed": (LR, 0.0),
    }  # fmt: skip
    assert_each_trained_once(model, groups)


def test_embeddings_learn_at_lr_if_nothing_else_is_said() -> None:
    model = Net()
    apply_lora(model, r=2, target_modules=["table"])
    (group,) = loraplus_groups(model, LR, RATIO)
    assert (group["name"], group["lr"]) == ("embedding", LR)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("further", ["use_dora", "lora_bias"])
def test_peft_models_have_magnitudes_heads_and_biases_of_b_at_lr(further: str, fused: bool) -> None:
    targets = ["up"] if further == "lora_bias" else ["table", "up"]  # PEFT gives embeddings no bias
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["head"], bias="lora_only", **{further: True})
    model = peft.get_peft_model(Net(), config)
    if fused:
        lora_kernels.fuse(model)
    groups = loraplus_groups(model, LR, RATIO, weight_decay=0.1)
    found = {
        name: {part.removeprefix("base_model.model.") for part in names}
        for name, names in names_of(model, groups).items()
    }
    magnitudes = {f"{name}.lora_magnitude_vector.default.weight" for name in targets}
    tables = {"table.lora_embedding_A.default", "table.lora_embedding_B.default"}
    assert found == {
        "A": {"up.lora_A.default.weight"},
        "B": {"up.lora_B.default.weight"},
        "other": {"head.modules_to_save.default.weight"},
        "not decayed": {"up.base_layer.bias", "head.modules_to_save.default.bias"}
        | (magnitudes if further == "use_dora" else {"up.lora_B.default.bias"}),
    } | ({"embedding": tables} if further == "use_dora" else {})
    assert {group["name"] for group in groups if group["lr"] == LR * RATIO} == {"B"}
    assert {group["name"] for group in groups if group["weight_decay"] == 0} == {"not decayed"}
    assert_each_trained_once(model, groups)


@pytest.mark.parametrize("kind", KIND_MODELS)
def test_every_kind_of_layer_has_each_trained_parameter_once(kind: str) -> None:
    case = KIND_MODELS[kind]
    ours = case.plain()
    apply_lora(ours, r=2 if kind != "convolution" else 4, **case.rules)
    rules = {"target_modules": []} | dict(case.rules) | dict(case.peft)
    theirs = peft.get_peft_model(case.plain(), peft.LoraConfig(r=4, **rules))
    for model in (ours, theirs):
        groups = loraplus_groups(model, LR, RATIO)
        assert_each_trained_once(model, groups)
        assert {group["name"] for group in groups} >= {"A", "B"}
        assert not any(group["name"] in ("other", "not decayed") for group in groups)


def test_only_the_adapters_that_are_trained_are_grouped() -> None:
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["up"]))
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["up"]))
    model.set_adapter("second")
    groups = loraplus_groups(model, LR, RATIO)
    assert [tuple(group["params"][0].shape) for group in groups] == [(3, 6), (5, 3)]
    model.base_model.model.up.lora_A["second"].weight.requires_grad_(False)
    assert [group["name"] for group in loraplus_groups(model, LR, RATIO)] == ["B"]


def test_a_head_that_shares_the_adapter_of_an_embedding_is_grouped_with_it() -> None:
    plain, rules = tied_llama(), TIED
    ours, theirs = copy.deepcopy(plain), peft.get_peft_model(plain, peft.LoraConfig(**rules))
    apply_lora(ours, **rules)
    for model, count in ((ours, 2), (theirs, 4)):  # PEFT makes Parameters of its own over the same memory
        groups = {group["name"]: group["params"] for group in loraplus_groups(model, LR, RATIO)}
        assert {name: len(params) for name, params in groups.items()} == {"A": 1, "B": 1, "embedding": count}


def test_a_scheduler_keeps_the_ratio() -> None:
    layer = FusedLoRALinear.from_linear(nn.Linear(5, 7), r=3)
    optimizer = torch.optim.AdamW(loraplus_groups(layer, LR, RATIO))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for _ in range(6):
        layer(torch.randn(2, 5)).sum().backward()
        optimizer.step()
        scheduler.step()
        a, b = (group["lr"] for group in optimizer.param_groups)
        assert b == pytest.approx(RATIO * a) and a < LR


def test_the_trainer_of_transformers_takes_the_optimiser(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(Net):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": nn.functional.cross_entropy(super().forward(input_ids), labels)}

    model = Model()
    apply_lora(model, r=2, target_modules=["up"])
    model(torch.arange(4), torch.arange(4) % 3)["loss"].backward()
    want = model.up.lora_B.detach() - LR * RATIO * model.up.lora_B.grad
    model.zero_grad()
    optimizer = torch.optim.SGD(loraplus_groups(model, LR, RATIO))
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        lr_scheduler_type="constant", max_grad_norm=0.0, per_device_train_batch_size=4,
    )  # fmt: skip
    data = [{"input_ids": torch.tensor(i), "labels": torch.tensor(i % 3)} for i in range(4)]
    transformers.Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None)).train()
    assert want.count_nonzero()
    torch.testing.assert_close(model.up.lora_B.detach(), want)


def test_what_cannot_be_meant_is_refused() -> None:
    layer = FusedLoRALinear.from_linear(nn.Linear(5, 7), r=3)
    for args, text in (
        ((0.0, 16.0), "lr must be a positive number, got 0.0"),
        ((LR, 0.5), "ratio is that of B's learning rate to A's, and must be at least 1, got 0.5"),
        ((LR, float("nan")), "ratio"),
    ):
        with pytest.raises(ValueError, match=text):
            loraplus_groups(layer, *args)
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        loraplus_groups(layer, LR, RATIO, weight_decay=-1)
    with pytest.raises(ValueError, match="embedding_lr must be a positive number, got 0"):
        loraplus_groups(layer, LR, RATIO, embedding_lr=0)
    with pytest.raises(TypeError, match="ratio must be a number, got '16'"):
        loraplus_groups(layer, LR, "16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no A or B of this model requires a gradient \(0 low-rank updates"):
        loraplus_groups(nn.Linear(2, 2), LR, RATIO)


@pytest.mark.parametrize("call", [lambda model: loraplus_groups(model, LR, RATIO), freeze_a, restart, analyse])
def test_layers_that_share_a_and_b_are_refused_by_name(call) -> None:
    own = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    theirs = peft.get_peft_model(copy.deepcopy(own), peft.VeraConfig(r=2, target_modules=["0", "1"]))
    apply_vera(own, r=2)
    for model in (own, theirs):
        with pytest.raises(ValueError) as raised:
            call(model)
        assert re.search(r"(adapters of another method|these layers).*: .*\b0, .*\b1 \(a ", str(raised.value))


def test_a_parameter_that_is_a_here_and_b_there_is_refused() -> None:
    one, other = (FusedLoRALinear.from_linear(nn.Linear(4, 4), r=4) for _ in range(2))
    other.lora_B = one.lora_A
    with pytest.raises(ValueError, match=r"a parameter \(4, 4\) of 1 is in the group 'B', .* in the group 'A'"):
        loraplus_groups(nn.Sequential(one, other), LR, RATIO)
    other.lora_B = nn.Parameter(torch.zeros(4, 4))
    other.lora_A = one.lora_A  # shared in one role, it is in one group once
    groups = loraplus_groups(nn.Sequential(one, other), LR, RATIO)
    assert [len(group["params"]) for group in groups] == [1, 2]
