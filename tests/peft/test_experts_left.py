"""Calls and layers of experts that are left to PEFT, each with its reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from support.experts import experts_of, inputs, model_of, same  # noqa: E402
from support.peft_experts import Holder, config, outer_of, randomise, step, wrapped  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft.experts import FusedExperts  # noqa: E402


def left(model: Any, change: Callable[[Any], Any], **kwargs: Any) -> str:
    """Return the reason for which a call of a fused model goes to PEFT after `change`. Its values are PEFT's."""
    given = inputs(next(model.parameters()).dtype)
    plain = copy.deepcopy(model)
    lora_kernels.fuse(model, strict=True)
    for each in (model, plain):
        change(each)
    want = step(plain, given, **kwargs)
    same(step(model, given, **kwargs), {name: t.double() for name, t in want.items()}, 1e-12)
    outer = outer_of(model)
    (reason,) = outer.passed_over
    assert outer.fused_calls == 0 and outer.passed_over[reason] == 1
    return reason


def hook(*_: object) -> None:
    """Do nothing."""


CHANGES = {
    "the wrapper of gate_up_proj has hooks": lambda model: outer_of(model).base_layer.register_forward_hook(hook),
    "this Qwen3MoeExperts has hooks": lambda model: outer_of(model).get_base_layer().register_forward_pre_hook(hook),
    "its down_proj is trained": lambda model: outer_of(model).get_param().requires_grad_(),
    "an adapter that is active twice": lambda model: outer_of(model)._active_adapter.append("default"),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_a_fused_call_would_pass_over_goes_to_peft(reason):
    model = wrapped()
    outer_of(model)._active_adapter = ["default"]
    assert reason in left(model, CHANGES[reason])


def test_an_adapter_of_two_dtypes_is_left_to_peft():
    model = wrapped(dtype=torch.float32)
    outer_of(model).lora_B["default"].double()
    (why,) = lora_kernels.fuse(model).not_fused.values()  # that of gate_up_proj is as it was
    assert why == "adapter 'default' has lora_A in torch.float32 and lora_B in torch.float64"


def test_an_implementation_that_somebody_has_registered_goes_to_peft():
    from transformers.integrations import moe

    def doubled(self, *args):
        return 2 * moe.batched_mm_experts_forward(self, *args)

    def change(model):
        outer_of(model).get_base_layer().config._experts_implementation = "doubled"

    moe.ALL_EXPERTS_FUNCTIONS["doubled"] = doubled
    try:
        assert "'doubled', which is not one of transformers" in left(wrapped(), change)
    finally:
        del moe.ALL_EXPERTS_FUNCTIONS["doubled"]


def test_other_arguments_and_shapes_go_to_peft():
    model, (x, ids, weights, _) = wrapped(dtype=torch.float32), inputs()
    lora_kernels.fuse(model, strict=True)
    outer, want = outer_of(model), model(x, ids, weights).detach()
    assert torch.equal(outer(x, ids, top_k_weights=weights), want)
    assert torch.equal(outer(x, top_k_weights=weights, top_k_index=ids), want)
    with pytest.raises(TypeError):
        outer(x, ids, weights, 3)
    with pytest.raises(ValueError, match="mixed adapter batches"):
        outer(x, ids, weights, adapter_names=["default"] * 9)
    with pytest.raises(RuntimeError):
        outer(x.double(), ids, weights)
    assert sorted(outer.passed_over) == [
        "other arguments than the experts of each token and their weights",
        "x is torch.float64, the stacks torch.float32",
    ]


def test_merged_adapters_that_are_disabled_are_unmerged_by_peft():
    model, given = wrapped(), inputs(torch.float64)
    lora_kernels.fuse(model, strict=True)
    base = outer_of(model).get_param().detach().clone()
    model.merge_adapter()
    with model.disable_adapter():
        model(*given[:3])
    assert outer_of(model).merged is False
    torch.testing.assert_close(outer_of(model).get_param(), base)
    assert list(outer_of(model).passed_over) == ["merged adapters that are disabled, which PEFT unmerges"]


def test_other_parameters_are_left_to_peft():
    """A bias of gpt-oss, and the weight of a linear layer."""
    model = randomise(peft.get_peft_model(Holder(experts_of("GptOss")), config(("down_proj", "down_proj_bias"))))
    want = model(*inputs()[:3])
    report = lora_kernels.fuse(model)
    assert "down_proj_bias has an adapter" in report.not_fused["base_model.model.experts"]
    assert torch.equal(model(*inputs()[:3]), want)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x)

    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=[], target_parameters=["head.weight"]))
    report = lora_kernels.fuse(model)
    assert not report.fused and "a Linear, whose forward is not one" in report.not_fused["base_model.model.head"]
    with pytest.raises(RuntimeError, match="a Linear, whose forward"):
        lora_kernels.fuse(model, strict=True)


def test_a_model_of_experts_does_not_compute_by_row():
    model = peft.get_peft_model(model_of("Qwen3Moe"), config(target_modules=["q_proj"]))
    lora_kernels.fuse(model)
    with pytest.raises(RuntimeError, match=r"mlp\.experts"):
        lora_kernels.mixed(model, ["default", None])


def test_an_unknown_forward_of_peft_is_left_alone(monkeypatch):
    def forward(self, x):
        return x

    monkeypatch.setattr("peft.tuners.lora.layer.ParamWrapper.forward", forward)
    report = lora_kernels.fuse(wrapped())
    assert not report.fused and all("has been replaced by a function" in why for why in report.not_fused.values())


def test_unfused_wrappers_are_pefts_again():
    model = wrapped()
    before = [dict(each.__dict__) for each in model.modules()]
    lora_kernels.fuse(model, strict=True)
    lora_kernels.unfuse(model)
    assert not any(isinstance(each, FusedExperts) for each in model.modules())
    assert [each.__dict__.keys() for each in model.modules()] == [each.keys() for each in before]
