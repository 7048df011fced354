"""`apply_lora`, adapter files, merging and counting serve every kind of layer that can have an adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from support.adapter_models import assert_unchanged, state, train
from support.kind_models import KIND_MODELS, KindModel
from torch import nn

from lora_kernels import (
    adapter_parameters,
    apply_lora,
    load_adapter,
    mark_only_lora_as_trainable,
    merge_and_unload,
    save_adapter,
    trainable_parameters,
)
from lora_kernels.models.kinds import lora_layers

peft = pytest.importorskip("peft")
st = pytest.importorskip("safetensors.torch")


@pytest.fixture(params=KIND_MODELS)
def kind(request: pytest.FixtureRequest) -> KindModel:
    return KIND_MODELS[request.param]


def adapted(kind: KindModel) -> nn.Module:
    model = kind.plain()
    apply_lora(model, r=2, lora_alpha=3, **kind.rules)
    return train(model)


def in_peft(kind: KindModel) -> nn.Module:
    config = peft.LoraConfig(r=2, lora_alpha=3, **kind.rules, **kind.peft)
    return train(peft.get_peft_model(kind.plain(), config)).eval()


def test_the_layers_that_are_named_get_adapters_that_change_nothing_yet(kind):
    model = kind.plain()
    want = kind.run(model)
    report = apply_lora(model, r=2, verify=kind.inputs(torch.Generator().manual_seed(0)), **kind.rules)
    assert {name: type(layer).__name__ for name, layer in lora_layers(model).items()} == kind.adapted
    assert [layer.name for layer in report.layers] == [*kind.adapted] and not report.without_effect
    torch.testing.assert_close(kind.run(model), want)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter_parameters(model)}
    assert trainable_parameters(model).trainable == sum(p.numel() for p in adapter_parameters(model))


def test_peft_reads_what_is_saved_and_computes_the_same(kind, tmp_path):
    model = adapted(kind)
    save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(kind.plain(), tmp_path).eval()
    torch.testing.assert_close(kind.run(other), kind.run(model))


def test_what_peft_saves_is_loaded_into_a_plain_and_an_adapted_model(kind, tmp_path):
    model = in_peft(kind)
    model.save_pretrained(tmp_path)
    want = kind.run(model)
    for other in (kind.plain(), adapted(kind)):
        load_adapter(other, tmp_path)
        torch.testing.assert_close(kind.run(other), want)


def test_merge_and_unload_gives_the_plain_layers_with_the_same_results(kind):
    model = adapted(kind)
    want = kind.run(model)
    kinds = {name: type(module) for name, module in kind.plain().named_modules()}
    assert merge_and_unload(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    torch.testing.assert_close(kind.run(model), want)
    assert trainable_parameters(model).trainable == 0


def test_a_file_of_another_shape_is_named_and_changes_nothing(kind, tmp_path):
    save_adapter(adapted(kind), tmp_path)
    tensors = st.load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key or "embedding_B" in key)
    st.save_file(tensors | {key: torch.cat([tensors[key]] * 2)}, tmp_path / "adapter_model.safetensors")
    for model in (kind.plain(), adapted(kind)):
        before, modules = state(model), [id(module) for module in model.modules()]
        with pytest.raises(ValueError, match=r"should be .* in this model"):
            load_adapter(model, tmp_path)
        assert_unchanged(model, before)
        assert [id(module) for module in model.modules()] == modules


def test_gradients_reach_every_adapter(kind):
    model = adapted(kind)
    kind.run(model.train()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter_parameters(model))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_choice_of_what_is_trained_knows_every_kind(kind):
    model = adapted(kind)
    mark_only_lora_as_trainable(model, bias="lora_only")
    biases = {
        f"{name}.{key}"
        for name, layer in lora_layers(model).items()
        for key, _ in layer.named_parameters()
        if "bias" in key.rpartition(".")[2]
    }
    adapters = {id(p) for p in adapter_parameters(model)}
    assert {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapters} == biases


def test_copies_load_the_state_of_the_model(kind):
    model = adapted(kind)
    other = copy.deepcopy(model)
    for parameter in adapter_parameters(other):
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(kind.run(other), kind.run(model), rtol=0, atol=0)
