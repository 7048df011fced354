"""Adapters on experts in whole models without PEFT, and their files in both directions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from support.experts import FAMILIES, STACKS, model_of  # noqa: E402
from support.peft_experts import BEFORE_20, config, randomise  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels import FusedLoRAExperts  # noqa: E402

TARGETS = [f"experts.{name}" for name in STACKS]
IDS = torch.randint(3, 32, (2, 6))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapted(family: str, **settings) -> nn.Module:
    """Return a model whose experts have adapters that differ from zero."""
    model = model_of(family)
    lora_kernels.apply_lora(
        model, **({"r": 3, "lora_alpha": 4, "target_modules": [], "target_parameters": TARGETS} | settings)
    )
    return randomise(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_trains_saves_loads_and_merges(family, tmp_path):
    plain = model_of(family).state_dict()
    model = adapted(family)
    layers = [each for each in model.modules() if isinstance(each, FusedLoRAExperts)]
    assert layers and {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in lora_kernels.adapter_parameters(model))
    want = logits(model)
    lora_kernels.save_adapter(model, tmp_path)
    if not BEFORE_20:
        of_peft = peft.PeftModel.from_pretrained(model_of(family), tmp_path)
        torch.testing.assert_close(logits(of_peft), want, rtol=1e-4, atol=1e-5)
    loaded = model_of(family)
    lora_kernels.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), want)
    lora_kernels.merge_and_unload(loaded)
    torch.testing.assert_close(logits(loaded), want, rtol=1e-4, atol=1e-5)
    assert loaded.state_dict().keys() == plain.keys()
    assert not any(isinstance(each, FusedLoRAExperts) for each in loaded.modules())


@pytest.mark.parametrize("names", [STACKS, STACKS[:1], STACKS[1:]])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_files_of_peft_load(family, names, tmp_path):
    of_peft = randomise(peft.get_peft_model(model_of(family), config(names, target_modules=["q_proj"])))
    want = logits(of_peft)
    of_peft.save_pretrained(tmp_path)
    model = model_of(family)
    report = lora_kernels.load_adapter(model, tmp_path)
    assert {"model.layers.0.mlp.experts", "model.layers.0.self_attn.q_proj"} <= {each.name for each in report.layers}
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


def test_experts_are_adapted_beside_linear_layers_and_the_router_is_not():
    model = adapted("Qwen3Moe", target_modules=["q_proj"], lora_dropout=0.5)
    kinds = {type(each).__name__ for each in model.modules() if hasattr(each, "lora_alpha")}
    assert kinds == {"FusedLoRALinear", "FusedLoRAExperts"}
    router = model.model.layers[0].mlp.gate
    assert not any("lora" in name for name, _ in router.named_parameters())
    layer = model.model.layers[0].mlp.experts
    assert layer.lora_dropout == 0.5
    model.train()
    assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_gradient_checkpointing_of_a_model_replays_dropout():
    model = adapted("Mixtral", lora_dropout=0.3).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad.clone() for p in lora_kernels.adapter_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_copy_of_a_model_is_independent():
    model = adapted("Qwen3Moe")
    want, other = logits(model), copy.deepcopy(model)
    with torch.no_grad():
        for p in lora_kernels.adapter_parameters(model):
            p.zero_()
    assert torch.equal(logits(other), want) and not torch.equal(logits(model), want)


def test_modules_that_cannot_be_adapted_are_told():
    with pytest.raises(ValueError, match="down_proj_bias"):
        lora_kernels.apply_lora(model_of("GptOss"), target_modules=[], target_parameters=["experts.down_proj_bias"])
    model = model_of("Qwen3Moe")
    model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: None)
    with pytest.raises((TypeError, ValueError), match="has hooks"):
        lora_kernels.apply_lora(model, target_modules=[], target_parameters=TARGETS)


def test_ranks_that_differ_between_the_stacks_of_a_file_are_refused(tmp_path):
    patterns = {"rank_pattern": {"experts.gate_up_proj": 5}}
    peft.get_peft_model(model_of("Qwen3Moe"), config(**patterns)).save_pretrained(tmp_path)
    model = model_of("Qwen3Moe")
    with pytest.raises(ValueError, match=r"gives .*gate_up_proj, .*down_proj several values of r \(3, 5\)"):
        lora_kernels.load_adapter(model, tmp_path)
    assert not any(isinstance(each, FusedLoRAExperts) for each in model.modules())
