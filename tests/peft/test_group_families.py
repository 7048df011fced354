"""The names that `fuse(group=True)` knows, in the models that have them: values and gradients are PEFT's, and layers
that read another x are computed apart."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from peft import LoraConfig, get_peft_model  # noqa: E402
from support.peft_models import randomise  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft.groups import FAMILIES  # noqa: E402

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = {"input_ids": torch.arange(10).reshape(2, 5) % 32}


def deepseek(q_lora_rank: int | None) -> nn.Module:
    config = transformers.DeepseekV3Config(
        **SMALL, num_key_value_heads=2, moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, q_lora_rank=q_lora_rank, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        first_k_dense_replace=1,
    )  # fmt: skip
    return transformers.DeepseekV3Model(config)


def qwen3_5() -> nn.Module:
    if not hasattr(transformers, "Qwen3_5TextConfig"):
        pytest.skip("this transformers has no Qwen3.5")
    config = transformers.Qwen3_5TextConfig(
        **SMALL | {"num_hidden_layers": 1}, num_key_value_heads=1, head_dim=8, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, layer_types=["linear_attention"],
    )  # fmt: skip
    return transformers.Qwen3_5TextModel(config)


def qwen3_next() -> nn.Module:
    if not hasattr(transformers, "Qwen3NextConfig"):
        pytest.skip("this transformers has no Qwen3-Next")
    config = transformers.Qwen3NextConfig(
        **SMALL, num_key_value_heads=1, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=2, layer_types=["linear_attention"], mlp_only_layers=[0],
    )  # fmt: skip
    return transformers.Qwen3NextModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5Model(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4, max_source_positions=8,
        max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, dropout=0.0,
    )  # fmt: skip
    return transformers.WhisperModel(config)


def clip() -> nn.Module:
    config = transformers.CLIPTextConfig(**SMALL, max_position_embeddings=8)
    return transformers.CLIPTextModel(config)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=32, dim=16, hidden_dim=24, n_layers=1, n_heads=2, max_position_embeddings=8, dropout=0.0,
        attention_dropout=0.0,
    )  # fmt: skip
    return transformers.DistilBertModel(config)


def bert_decoder() -> nn.Module:
    config = transformers.BertConfig(
        **SMALL, is_decoder=True, add_cross_attention=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.BertModel(config)


def phi() -> nn.Module:
    return transformers.PhiModel(transformers.PhiConfig(**SMALL, resid_pdrop=0.0))


class MetaAttention(nn.Module):
    """The names that Meta gave in its Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.wq(x) * self.wk(x) + self.wv(x)


class MetaFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x):
        return self.w2(torch.tanh(self.w1(x)) * self.w3(x))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = MetaAttention(), MetaFeedForward()

    def forward(self, x):
        return self.feed_forward(self.attention(x))


NO_CACHE = {"use_cache": False}
DECODER = {"decoder_input_ids": IDS["input_ids"]}
AUDIO = {"input_features": torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))}
OTHER = {"encoder_hidden_states": torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))}
MLA = ["q_a_proj", "q_proj", "kv_a_proj_with_mqa"]
QWEN = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
QKV = ["q_proj", "k_proj", "v_proj"]
CASES = {
    "DeepSeek-V3": (lambda: deepseek(8), IDS, MLA, {(MLA[0], MLA[2]): 1}),
    "DeepSeek-V2-Lite": (lambda: deepseek(None), IDS, MLA, {(MLA[1], MLA[2]): 1}),
    "Qwen3.5": (qwen3_5, IDS | NO_CACHE, list(QWEN), {QWEN: 1}),
    "Qwen3-Next": (qwen3_next, IDS | NO_CACHE, ["in_proj_qkvz", "in_proj_ba"], {("in_proj_qkvz", "in_proj_ba"): 1}),
    "T5": (t5, IDS | DECODER, ["q", "k", "v", "wi_0", "wi_1"], {("q", "k", "v"): 3, ("wi_0", "wi_1"): 2}),
    "Whisper": (whisper, AUDIO | DECODER, QKV, {tuple(QKV): 3}),
    "CLIP": (clip, IDS, QKV, {tuple(QKV): 1}),
    "Phi": (phi, IDS, QKV, {tuple(QKV): 1}),
    "DistilBERT": (distilbert, IDS, ["q_lin", "k_lin", "v_lin"], {("q_lin", "k_lin", "v_lin"): 1}),
    "BERT with cross-attention": (bert_decoder, IDS | OTHER, ["query", "key", "value"], {("query", "key", "value"): 2}),
    "Meta's Llama": (Llama, {"x": OTHER["encoder_hidden_states"][..., :8]}, ["wq", "wk", "wv", "w1", "w2", "w3"],
                     {("wq", "wk", "wv"): 1, ("w1", "w3"): 1}),
}  # fmt: skip


def step(model: nn.Module, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    y = model(**given)
    y = y if isinstance(y, torch.Tensor) else y.last_hidden_state
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    return {"y": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_a_family_has_pefts_values_and_gradients_in_one_call(case):
    make, given, targets, expected = CASES[case]
    torch.manual_seed(0)
    theirs = get_peft_model(make(), LoraConfig(r=2, lora_alpha=3, target_modules=targets)).double().eval()
    randomise(theirs)
    given = {name: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in given.items()}
    ours = copy.deepcopy(theirs)
    report = lora_kernels.fuse(ours, group=True, strict=True)
    want = step(theirs, given)
    got = step(ours, given)
    assert got.keys() == want.keys() and len(want) > 4
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")
    found = [group.names for group in report.groups.values()]
    assert {names: found.count(names) for names in found} == expected
    assert all(group.calls == 1 and not group.passed_over for group in report.groups.values())


def test_every_family_is_in_a_case_here_or_in_a_test_of_diffusers():
    tested = {name for _, _, _, expected in CASES.values() for names in expected for name in names}
    of_diffusers = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
    assert {name for family in FAMILIES for name in family} <= tested | of_diffusers | {"gate_proj", "up_proj"}


class DiffusersAttention(nn.Module):
    """The projections of diffusers' Attention: of one input, of two, or of two jointly as in Flux and SD3."""

    def __init__(self, joint: bool = False, context: int = 8) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(context, 8), nn.Linear(context, 8)
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.joint = joint

    def forward(self, hidden_states, encoder_hidden_states=None):
        x = hidden_states
        other = x if self.joint or encoder_hidden_states is None else encoder_hidden_states
        y = self.to_q(x) * self.to_k(other).sum(0) + self.to_v(other).sum(0)
        if self.joint:
            e = encoder_hidden_states
            y = y + (self.add_q_proj(e) * self.add_k_proj(e) - self.add_v_proj(e)).sum(0)
        return y


@pytest.mark.parametrize(
    ("joint", "context", "two", "calls"),
    [
        (False, 8, False, [3]),
        (False, 8, True, [2]),  # cross-attention: keys and values are one call, and the queries another
        (False, 6, True, [2]),  # of a context of another width too
        (True, 8, True, [3, 3]),
    ],
)
def test_projections_of_diffusers_are_grouped_by_what_they_read(monkeypatch, joint, context, two, calls):
    from lora_kernels.peft import shared

    torch.manual_seed(0)
    theirs = get_peft_model(DiffusersAttention(joint, context), LoraConfig(r=2, target_modules=r"(to|add)_[qkv].*"))
    randomise(theirs)
    theirs.double()
    ours = copy.deepcopy(theirs)
    report = lora_kernels.fuse(ours, group=True, strict=True)
    made, inner = [], shared.lora_linear_group
    monkeypatch.setattr(
        shared, "lora_linear_group", lambda x, layers, **kw: made.append(len(layers)) or inner(x, layers, **kw)
    )
    given = {"hidden_states": torch.randn(5, 8).double()}
    if two:
        given["encoder_hidden_states"] = torch.randn(3, context).double()
    want, got = step(theirs, given), step(ours, given)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert made == calls and not any(group.passed_over for group in report.groups.values())


@pytest.mark.slow
def test_the_transformers_of_diffusers_are_grouped_and_have_pefts_values():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=[2, 2, 4],
    )  # fmt: skip
    theirs = get_peft_model(model, LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj"]))
    randomise(theirs)
    ours = copy.deepcopy(theirs)
    report = lora_kernels.fuse(ours, group=True, strict=True)
    given = {
        "hidden_states": torch.randn(1, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 16),
        "pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3), "return_dict": False,
    }  # fmt: skip
    torch.testing.assert_close(ours(**given)[0], theirs(**given)[0])
    assert sorted(group.names for group in report.groups.values()) == [
        ("add_q_proj", "add_k_proj"), ("to_q", "to_k", "to_v"), ("to_q", "to_k", "to_v"),
    ]  # fmt: skip
    assert all(group.calls == 1 and not group.passed_over for group in report.groups.values())


def test_strict_refuses_named_groups_that_cannot_be_made():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 4), nn.Linear(6, 4)

    model = get_peft_model(Two(), LoraConfig(r=2, target_modules=["left", "right"]))
    assert not lora_kernels.fuse(model, group=[("left", "right")]).groups
    lora_kernels.unfuse(model)
    with pytest.raises(RuntimeError, match="could not group left, right: two of them must be fused"):
        lora_kernels.fuse(model, group=[("left", "right")], strict=True)
    assert not any(hasattr(module, "fused_calls") for module in model.modules())
    assert len(lora_kernels.fuse(model, group=True, strict=True).fused) == 2  # True asks for no name
