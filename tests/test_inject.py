"""`apply_lora` and what goes with it. PEFT decides which layers get LoRA and what they compute."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.inject import (
    adapter_parameters,
    apply_lora,
    mark_only_lora_as_trainable,
    merge_and_unload,
    trainable_parameters,
)
from lora_kernels.targets import by_pattern, matches

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return x + self.mlp(torch.tanh(self.q_proj(self.norm(x))) * self.v_proj(x))


def plain() -> nn.Sequential:
    blocks = nn.Sequential(*(Block() for _ in range(3)))
    return nn.Sequential(OrderedDict(first=nn.Linear(6, 8), blocks=blocks, last=nn.Linear(8, 4)))


def llama(**more) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, **more,
        )
    )  # fmt: skip


def neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )


MODELS = {"plain": plain, "llama": llama, "neox": neox, "bert": bert}

RULES = [
    ("plain", {"target_modules": "all-linear"}),
    ("plain", {"target_modules": ["first", "q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    ("llama", {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]}),
    ("neox", {"target_modules": ["dense"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("plain", {"target_modules": r"blocks\.\d\.(q|v)_proj", "exclude_modules": r".*\.2\..*"}),
    ("plain", {"target_modules": ["mlp", "q_proj"], "exclude_modules": ["blocks.0.mlp", "q_proj"]}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "ALL-linear", "exclude_modules": ["down_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]}),
    (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3, "1.mlp.up_proj": 5},
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 32, "v_proj": 1},
        },
    ),
    ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"proj": 2}, "use_rslora": True}),
    ("neox", {"target_modules": "all-linear"}),
    ("neox", {"target_modules": ["query_key_value"]}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": r".*attention.*(query|value)", "lora_alpha": 3, "r": 4}),
]


def peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}


def like_peft(model: nn.Module, **rules) -> tuple[nn.Module, nn.Module]:
    """The model with our LoRA and with PEFT's, of equal and non-zero values."""
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**rules))
    apply_lora(model, **rules)
    ours = {n: m for n, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    layers = peft_layers(theirs)
    assert set(ours) == set(layers)
    with torch.no_grad():
        for name, layer in ours.items():
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape) / 4)
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape) / 4)
            layers[name].lora_A["default"].weight.copy_(layer.lora_A)
            layers[name].lora_B["default"].weight.copy_(layer.lora_B)
    return model, theirs


def run(model: nn.Module, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if kind == "plain":
        return model(torch.randn(5, 6, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype))
    return model(input_ids=torch.randint(32, (2, 7), generator=generator)).logits


@pytest.mark.parametrize(("kind", "rules"), RULES)
def test_the_layers_values_and_gradients_are_pefts(kind, rules):
    ours, theirs = like_peft(MODELS[kind]().double().eval(), **rules)
    theirs.eval()
    y, want = run(ours, kind), run(theirs, kind)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    layers = peft_layers(theirs)
    for name, layer in ours.named_modules():
        if isinstance(layer, FusedLoRALinear):
            other = layers[name]
            assert (layer.r, layer.scaling) == (other.r["default"], other.scaling["default"])
            torch.testing.assert_close(layer.lora_A.grad, other.lora_A["default"].weight.grad, rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(layer.lora_B.grad, other.lora_B["default"].weight.grad, rtol=1e-7, atol=1e-7)
    assert trainable_parameters(ours).trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert all(p.grad is None for n, p in ours.named_parameters() if "lora_" not in n)


PARTS = st.sampled_from(["a", "b", "ab", "0", "1", "fc", "q_proj"])
DOTTED = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@settings(deadline=None, max_examples=200)
@given(
    name=DOTTED,
    wanted=st.one_of(st.lists(DOTTED, max_size=3), st.sampled_from([r".*\.a", "a|b", r"(a|b)\..*", ".*q_proj"])),
    excluded=st.one_of(st.none(), st.lists(DOTTED, max_size=2), st.sampled_from([r".*\.0\..*", "fc"])),
    pattern=st.dictionaries(st.one_of(DOTTED, st.sampled_from(["^a", r"\d", "a|b.*"])), st.integers(1, 9), max_size=3),
)
def test_the_rules_for_names_are_pefts(name, wanted, excluded, pattern):
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    config = peft.LoraConfig(target_modules=wanted, exclude_modules=excluded)
    theirs = check_target_module_exists(config, name)
    assert (matches(wanted, name) and not matches(excluded or (), name)) == bool(
        theirs and type(theirs).__name__ != "_ExcludedModule"
    )
    assert by_pattern(pattern, name, 0) == pattern.get(get_pattern_key(pattern.keys(), name), 0)


def test_defaults_are_pefts():
    config, model = peft.LoraConfig(), plain()
    layer = apply_lora(model).layers[0]
    assert (layer.r, layer.lora_alpha) == (config.r, config.lora_alpha)
    assert model.first.lora_dropout == config.lora_dropout and model.first.use_rslora == config.use_rslora


def test_a_fresh_model_computes_its_base_and_shares_its_weights():
    model = plain()
    weight, want = model.first.weight, run(model, "plain")
    apply_lora(model, lora_dropout=0.5)
    assert model.first.weight is weight
    torch.testing.assert_close(run(model, "plain"), want)


def test_settings_reach_the_layers():
    model = plain().bfloat16()
    apply_lora(model, r=3, lora_dropout=0.25, adapter_dtype=torch.float32, backend="eager", use_rslora=True)
    layer = model.blocks[0].q_proj
    assert (layer.r, layer.lora_dropout, layer.backend, layer.use_rslora) == (3, 0.25, "eager", True)
    assert layer.lora_A.dtype == torch.float32 and layer.scaling == 8 / 3**0.5


def test_the_report():
    model = plain()
    report = apply_lora(
        model, target_modules=["q_proj", "nonsense"], exclude_modules=["blocks.1.q_proj"], rank_pattern={"v_proj": 2}
    )
    assert [layer.name for layer in report.layers] == ["blocks.0.q_proj", "blocks.2.q_proj"]
    assert (
        report.passed_over["blocks.1.q_proj"] == "in exclude_modules"
        and report.passed_over["first"] == "not in target_modules"
    )
    assert report.unused == ("nonsense", "rank_pattern v_proj")
    text = str(report)
    assert re.search(r"^blocks\.0\.q_proj +8 +8 +8 → 8$", text, re.M)
    assert "passed over, in exclude_modules: blocks.1.q_proj" in text and "and 3 more" in text
    assert "matched nothing: nonsense, rank_pattern v_proj" in text


def test_tied_weights_stay_tied():
    model = llama(tie_word_embeddings=True)
    apply_lora(model, target_modules=["lm_head", "q_proj"])
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.requires_grad


def test_a_layer_at_two_places_is_one_layer_still():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = apply_lora(model)
    assert model[0] is model[2] and isinstance(model[0], FusedLoRALinear) and len(report.layers) == 1
    merge_and_unload(model)
    assert model[0] is model[2] and type(model[0]) is nn.Linear


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


def test_what_is_not_exactly_a_linear_is_passed_over_with_a_reason():
    model = nn.ModuleDict({**awkward(), "fc": nn.Linear(4, 4)})
    before = {name: module for name, module in model.named_modules() if name != "fc"}
    report = apply_lora(model)
    assert [layer.name for layer in report.layers] == ["fc"]
    assert set(report.passed_over) == {"own", "lazy", "attention.out_proj", "norm", "hooked", "wrapped"}
    assert "NonDynamicallyQuantizableLinear" in report.passed_over["attention.out_proj"]
    assert "hooks" in report.passed_over["hooked"] and "hooks" in report.passed_over["wrapped"]
    assert all(module is before[name] for name, module in model.named_modules() if name in before)


@pytest.mark.parametrize("name", ["own", "lazy", "out_proj", "norm", "hooked", "wrapped", "conv", "attention"])
def test_what_was_named_and_cannot_be_replaced_raises(name):
    model = nn.ModuleDict({**awkward(), "fc": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 1)})
    with pytest.raises(ValueError, match=f"{name}.*exclude_modules"):
        apply_lora(model, target_modules=["fc", name])
    assert type(model["fc"]) is nn.Linear and model["fc"].weight.requires_grad


@pytest.mark.parametrize("padded", [False, True])
def test_the_inference_path_of_a_transformer_encoder_does_not_skip_the_adapters(padded):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2)
    apply_lora(model)
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    want = model(x, src_key_padding_mask=mask)[:, :3]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=mask)[:, :3], want)


# --- errors leave the model as it was ---


@pytest.mark.parametrize(
    ("error", "rules", "words"),
    [
        (ValueError, {"target_modules": ["wrong"]}, "'wrong'.*the model has first "),
        (ValueError, {"target_modules": ".*wrong"}, "the model has first "),
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


def test_twice_is_refused():
    model = plain()
    apply_lora(model, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"already \(blocks\.0\.q_proj.*merge_and_unload"):
        apply_lora(model, target_modules=["v_proj"])


def test_a_peft_model_is_refused():
    model = peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="fuse"):
        apply_lora(model)


@pytest.mark.parametrize(("model", "words"), [(nn.Linear(2, 2), "from_linear"), (nn.Conv1d(2, 2, 1), "1 Conv1d")])
def test_nothing_to_replace(model, words):
    with pytest.raises(ValueError, match=words):
        apply_lora(model)


# --- merging ---


def test_merge_and_unload():
    model = plain().eval()
    apply_lora(model, target_modules=["q_proj", "mlp"])
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    want = run(model, "plain")
    assert merge_and_unload(model) is model
    assert not any(isinstance(m, FusedLoRALinear) for m in model.modules())
    assert type(model.blocks[0].q_proj) is nn.Linear and not model.blocks[0].q_proj.training
    assert trainable_parameters(model).trainable == 0
    torch.testing.assert_close(run(model, "plain"), want)
    apply_lora(model)  # a plain model again
    with pytest.raises(ValueError, match="no FusedLoRALinear"):
        merge_and_unload(plain())


def test_merge_and_unload_of_a_layer_itself():
    layer = FusedLoRALinear(3, 2)
    assert type(merge_and_unload(layer)) is nn.Linear


def test_a_merge_that_fails_changes_nothing():
    model = plain()
    apply_lora(model)
    with torch.no_grad():
        model.last.lora_B.fill_(float("inf"))
    layers = list(model.modules())
    with pytest.raises(ValueError, match=r"^last: merging"):
        merge_and_unload(model)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))


# --- what trains ---


def test_adapter_parameters():
    model = plain()
    apply_lora(model, target_modules=["q_proj"])
    names = {name for name, p in model.named_parameters() if any(p is q for q in adapter_parameters(model))}
    assert names == {f"blocks.{i}.q_proj.lora_{part}" for i in range(3) for part in "AB"}
    assert list(adapter_parameters(plain())) == []


@pytest.mark.parametrize(
    ("bias", "more"),
    [
        ("none", set()),
        ("lora_only", {f"blocks.{i}.q_proj.bias" for i in range(3)}),
        (
            "all",
            {"first.bias", "last.bias"}
            | {f"blocks.{i}.{n}.bias" for i in range(3) for n in ("q_proj", "v_proj", "norm")},
        ),
    ],
)
def test_mark_only_lora_as_trainable(bias, more):
    model = plain()
    apply_lora(model, target_modules=["q_proj"])
    model.requires_grad_(True)
    model.blocks[0].q_proj.lora_A.requires_grad_(False)  # frozen on purpose: it stays so
    mark_only_lora_as_trainable(model, bias)
    adapters = {f"blocks.{i}.q_proj.lora_{part}" for i in range(3) for part in "AB"} - {"blocks.0.q_proj.lora_A"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters | more
    run(model, "plain").sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_mark_only_lora_refuses():
    model = plain()
    with pytest.raises(ValueError, match="apply_lora"):
        mark_only_lora_as_trainable(model)
    with pytest.raises(ValueError, match="lora_onyl"):
        mark_only_lora_as_trainable(model, "lora_onyl")
    assert all(p.requires_grad for p in model.parameters())


def test_trainable_parameters():
    model = nn.Sequential(nn.Linear(100, 60), nn.Linear(60, 10, bias=False))
    model[1].weight = nn.Parameter(model[1].weight, requires_grad=False)
    summary = trainable_parameters(model)
    assert (summary.trainable, summary.total) == (6060, 6660)
    assert str(summary) == "trainable: 6,060 of 6,660 (90.99 %)"
    assert str(trainable_parameters(nn.ReLU())) == "trainable: 0 of 0 (0.00 %)"
