"""`apply_lora`, adapter files, merging and counting serve every kind of layer that can have an adapter."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.adapter_models import assert_unchanged, state, train
from support.kind_models import KIND_MODELS, KindModel
from torch import nn

from lora_kernels import (
    AdapterPool,
    adapter_parameters,
    apply_lora,
    load_adapter,
    mark_only_lora_as_trainable,
    merge_and_unload,
    save_adapter,
    trainable_parameters,
)
from lora_kernels.jobs import Job, Jobs, LoRAConfig
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


def skip_where_peft_cannot_load(kind: KindModel) -> None:
    from support.peft_experts import BEFORE_20  # which needs PEFT

    if BEFORE_20 and "target_parameters" in kind.rules:
        pytest.skip(f"PEFT {peft.__version__} cannot load adapters into the experts of the latest transformers")


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
    skip_where_peft_cannot_load(kind)
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


# --- the choice of layers ---


class Every(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.fc = nn.Embedding(8, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 8)
        self.attn, self.norm = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)


def test_all_linear_stands_for_linear_layers_alone():
    model = Every()
    report = apply_lora(model)
    assert [layer.name for layer in report.layers] == ["fc"] and set(report.passed_over) == {"attn.out_proj"}


def test_all_linear_stands_for_conv1d_too_as_in_peft():
    model = KIND_MODELS["Conv1D"].plain()
    config = peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=True)
    theirs = peft.get_peft_model(KIND_MODELS["Conv1D"].plain(), config)
    want = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert {layer.name for layer in apply_lora(model).layers} == want and len(want) == 8


def test_only_linear_layers_are_quantised_or_split():
    model = Every()
    report = apply_lora(model, target_modules=["table", "conv", "fc", "attn"], quant="nf4")
    assert {layer.name: layer.quant for layer in report.layers} == {
        "table": None, "conv": None, "fc": "nf4", "attn": None
    }  # fmt: skip
    assert report.quantised is not None and report.quantised[0] == 8 * 8 * 4
    with pytest.raises(ValueError, match=r"table, conv \(init='pissa' is for linear layers"):
        apply_lora(Every(), target_modules=["table", "conv", "fc"], init="pissa")


def test_a_parameter_of_a_linear_layer_is_the_layer(tmp_path):
    rules = {"target_parameters": ["0.weight"], "r": 2}
    theirs = train(peft.get_peft_model(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), peft.LoraConfig(**rules))).eval()
    theirs.save_pretrained(tmp_path)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    model.load_state_dict(
        {f"0.{key}": theirs.base_model.model[0].base_layer.state_dict()[key] for key in ("weight", "bias")}
    )
    load_adapter(model, tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), theirs(x))


@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        ({"target_parameters": "experts.down_proj"}, TypeError, "must be a list"),
        ({"target_parameters": ["norm.weight"]}, ValueError, r"cannot be replaced: .*norm.*RMSNorm"),
        ({"target_parameters": ["q_proj.bias"]}, ValueError, r"'q_proj.bias'\) name no parameter .*experts\.down_proj"),
        ({"target_parameters": ["gate.weight"]}, ValueError, r"mlp\.gate"),
        (
            {"target_parameters": ["gate_up_proj", "down_proj"], "rank_pattern": {"down_proj": 3}},
            ValueError,
            r"several values of r \(8, 3\)|several values of r \(3, 8\)",
        ),
        ({"target_parameters": ["experts.down_proj"], "use_dora": True}, ValueError, r"mlp\.experts: use_dora"),
    ],
)
def test_parameters_that_cannot_be_adapted_are_refused(rules, error, words):
    model = KIND_MODELS["experts"].plain()
    before = state(model)
    with pytest.raises(error, match=words):
        apply_lora(model, **rules)
    assert_unchanged(model, before)


def test_errors_name_the_kinds_of_layers_that_the_model_has():
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"no linear layer.*2 Conv2d.*target_modules"):
        apply_lora(convolutions)
    with pytest.raises(ValueError, match=r"quant='nf4' is for linear layers, and none is chosen: 0\."):
        apply_lora(convolutions, target_modules=["0"], quant="nf4")


def test_a_part_of_a_chosen_attention_is_not_reported_as_passed_over():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    assert set(apply_lora(model, target_modules=["attention"]).passed_over) == {"fc"}
    with pytest.raises(ValueError, match=r"out_proj of an nn.MultiheadAttention.*name the attention instead"):
        apply_lora(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}), target_modules=["out_proj"])


def test_names_of_parameters_that_match_nothing_are_reported():
    model = KIND_MODELS["experts"].plain()
    report = apply_lora(model, target_parameters=["experts.down_proj", "experts.up"])
    assert report.unused == ("target_parameters experts.up",)


# --- what others compute or serve ---


def test_a_file_of_peft_over_a_convolution_that_it_computes_otherwise_warns(tmp_path):
    base = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    with pytest.warns(UserWarning, match=r"another function than ours: 0 \(PEFT's forward leaves padding_mode"):
        load_adapter(model, tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"something else in PEFT: 0 \("):
        save_adapter(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(copy.deepcopy(base), tmp_path / "ours")  # it was trained with our function


def test_what_is_not_linear_is_refused_by_jobs_and_pools_by_name(tmp_path):
    kind = KIND_MODELS["embedding"]
    for model, targets, words in (
        (kind, ["0", "3"], r"0 \(a Embedding\)"),
        (KIND_MODELS["Conv1D"], "all-linear", "a Conv1D"),
    ):
        with pytest.raises(ValueError, match=rf"adapt nn\.Linear layers only.*{words}"):
            Jobs(model.plain()).add(
                Job("a", [torch.zeros(1)], lambda y, x: y.sum(), LoRAConfig(target_modules=targets))
            )
    save_adapter(adapted(kind), tmp_path / "table")
    with pytest.raises(ValueError, match=r"only those of linear layers.*0\.lora_embedding_A"):
        AdapterPool(kind.plain()).register("a", tmp_path / "table")
    with pytest.raises(ValueError, match="0 is a FusedLoRAEmbedding with an adapter of its own"):
        AdapterPool(adapted(kind))
    save_adapter(adapted(KIND_MODELS["experts"]), tmp_path / "experts")
    with pytest.raises(ValueError, match="target_parameters"):
        AdapterPool(KIND_MODELS["experts"].plain()).register("a", tmp_path / "experts")


def test_dropout_of_experts_is_left_out_of_the_file_because_peft_refuses_it(tmp_path):
    kind = KIND_MODELS["one stack of experts"]
    skip_where_peft_cannot_load(kind)
    model = kind.plain()
    apply_lora(model, lora_dropout=0.1, **kind.rules)
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.1 is not saved"):
        save_adapter(train(model), tmp_path)
    other = peft.PeftModel.from_pretrained(kind.plain(), tmp_path).eval()
    torch.testing.assert_close(kind.run(other), kind.run(model.eval()))
