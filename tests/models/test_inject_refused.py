"""`apply_lora` gives a reason for each module that it leaves alone, and its errors leave the model as it was."""

from __future__ import annotations

import re

import pytest
import torch
from support.inject_models import peft, plain
from torch import nn

from lora_kernels.models.inject import apply_lora


class OwnLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def awkward() -> dict[str, nn.Module]:
    hooked, wrapped = nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    wrapped.forward = nn.Linear(4, 4).forward  # as accelerate's hooks do
    return {
        "own": OwnLinear(4, 4),
        "lazy": nn.LazyLinear(4),
        "attention": nn.MultiheadAttention(4, 2),
        "norm": torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "hooked": hooked,
        "wrapped": wrapped,
    }


def test_a_module_that_is_not_exactly_a_linear_is_passed_over_with_a_reason():
    model = nn.ModuleDict({**awkward(), "fc": nn.Linear(4, 4)})
    before = {name: module for name, module in model.named_modules() if name != "fc"}
    report = apply_lora(model)
    assert [layer.name for layer in report.layers] == ["fc"]
    assert set(report.passed_over) == {"own", "lazy", "attention.out_proj", "norm", "hooked", "wrapped"}
    assert "the out_proj of an nn.MultiheadAttention" in report.passed_over["attention.out_proj"]
    assert "hooks" in report.passed_over["hooked"] and "hooks" in report.passed_over["wrapped"]
    assert all(module is before[name] for name, module in model.named_modules() if name in before)


@pytest.mark.parametrize("name", ["own", "lazy", "out_proj", "norm", "hooked", "wrapped", "turned", "layer_norm"])
def test_a_named_module_that_cannot_be_replaced_is_an_error(name):
    more = {"turned": nn.ConvTranspose1d(4, 4, 1), "layer_norm": nn.LayerNorm(4)}
    model = nn.ModuleDict({**awkward(), **more, "fc": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=f"{name}.*exclude_modules"):
        apply_lora(model, target_modules=["fc", name])
    assert type(model["fc"]) is nn.Linear and model["fc"].weight.requires_grad


# --- errors leave the model as it was ---


@pytest.mark.parametrize(
    ("error", "rules", "words"),
    [
        (ValueError, {"target_modules": ["wrong"]}, "'wrong'.*the model has first, .*not in target_modules"),
        (ValueError, {"target_modules": ".*wrong"}, "the model has first, "),
        (ValueError, {"exclude_modules": ".*"}, "in exclude_modules"),
        (ValueError, {"r": 0}, "r must be"),
        (ValueError, {"rank_pattern": {"mlp": -1}}, "-1"),
        (ValueError, {"alpha_pattern": {"last": float("nan")}}, "nan"),
        (ValueError, {"lora_dropout": 1.0}, "lora_dropout"),
        (ValueError, {"backend": "fast"}, "unknown backend 'fast'"),
        (ValueError, {"target_modules": ".*proj", "layers_to_transform": [0]}, "list of target_modules"),
        (TypeError, {"adapter_dtype": torch.bfloat16}, "adapter_dtype"),
        (re.error, {"target_modules": "("}, "unterminated"),
    ],
)
def test_an_error_changes_nothing(error, rules, words):
    model = plain()
    model.first.bias.requires_grad_(False)
    kinds, trained = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=words):
        apply_lora(model, **rules)
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == trained


def test_a_second_apply_lora_is_refused():
    model = plain()
    apply_lora(model, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"already \(blocks\.0\.q_proj.*merge_and_unload"):
        apply_lora(model, target_modules=["v_proj"])


def test_a_peft_model_is_refused():
    model = peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="fuse"):
        apply_lora(model)


@pytest.mark.parametrize(("model", "words"), [(nn.Linear(2, 2), "from_linear"), (nn.Conv1d(2, 2, 1), "1 Conv1d")])
def test_a_model_without_a_layer_to_replace_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        apply_lora(model)
