"""A small model for each kind of layer that can have an adapter, how it is run, and the rules that choose the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """A block with an nn.MultiheadAttention, as in open_clip."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x, x, x, need_weights=False)[0])


def _conv() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 1, bias=False), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 16, 4))


def _experts() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        mlp_only_layers=[0],
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def _gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def _table() -> nn.Module:
    return nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def _ids(generator: torch.Generator) -> Tensor:
    return torch.randint(32, (2, 6), generator=generator)


@dataclass(frozen=True)
class KindModel:
    """A model with layers of one kind."""

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    rules: Mapping[str, Any]
    """The rules of `apply_lora` and of PEFT's LoraConfig that choose these layers."""
    adapted: Mapping[str, str]
    """The class of each layer with an adapter, by name."""
    peft: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of LoraConfig."""

    def plain(self) -> nn.Module:
        """Return the model, with the same weights each time."""
        torch.manual_seed(0)
        return self.make().eval()

    def run(self, model: nn.Module) -> Tensor:
        """Return what a model computes."""
        y = model(self.inputs(torch.Generator().manual_seed(3)))
        return y if isinstance(y, Tensor) else y.logits


KIND_MODELS = {
    "embedding": KindModel(
        _table, _ids, {"target_modules": ["0", "3"]}, {"0": "FusedLoRAEmbedding", "3": "FusedLoRALinear"}
    ),
    "convolution": KindModel(
        _conv,
        lambda g: torch.randn(2, 3, 8, 8, generator=g),
        {"target_modules": ["0", "2", "4"], "rank_pattern": {"2": 3}},
        {"0": "FusedLoRAConv2d", "2": "FusedLoRAConv2d", "4": "FusedLoRALinear"},
    ),
    "attention": KindModel(
        Attention,
        lambda g: torch.randn(2, 5, 8, generator=g),
        {"target_modules": ["attn"]},
        {"attn": "FusedLoRAMultiheadAttention"},
    ),
    "experts": KindModel(
        _experts,
        _ids,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {
            "model.layers.0.self_attn.q_proj": "FusedLoRALinear",
            "model.layers.1.self_attn.q_proj": "FusedLoRALinear",
            "model.layers.1.mlp.experts": "FusedLoRAExperts",
        },
    ),
    "one stack of experts": KindModel(
        _experts,
        _ids,
        {"target_parameters": ["experts.down_proj"], "alpha_pattern": {"experts.down_proj": 5}},
        {"model.layers.1.mlp.experts": "FusedLoRAExperts"},
    ),
    "Conv1D": KindModel(
        _gpt2,
        _ids,
        {"target_modules": ["c_attn"]},
        {f"transformer.h.{i}.attn.c_attn": "FusedLoRAConv1D" for i in range(2)},
        {"fan_in_fan_out": True},
    ),
}
