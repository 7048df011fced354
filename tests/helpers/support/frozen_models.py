"""Layers whose adapters are not zero, their gradients, and a model with tied weights: for tests of training methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear
from lora_kernels.models.pairs import pairs

TIED = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}
"""The rules of `apply_lora` and of PEFT that give `tied_llama` an adapter that its table and head share."""


def tied_llama() -> nn.Module:
    """Return a Llama of one block whose head is the table of its embedding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def random_adapters(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for pair in pairs(model):
            pair.a.normal_()
            pair.b.normal_()
    return model


def linear(N: int = 7, K: int = 5, r: int = 3, **kwargs: Any) -> FusedLoRALinear:
    torch.manual_seed(0)
    dtype = kwargs.pop("dtype", torch.float64)
    return random_adapters(FusedLoRALinear.from_linear(nn.Linear(K, N, dtype=dtype), r=r, lora_alpha=6, **kwargs))


def gradients(model: nn.Module, step: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    step(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_x(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x).double().square().sum()
