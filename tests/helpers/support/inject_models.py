"""Models for `apply_lora`, and their copies with PEFT's LoRA."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.models.inject import apply_lora

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


def peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}


def same_in_peft(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of PEFT's layer by the names that a `FusedLoRALinear` has for them."""
    parts = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "lora_magnitude_vector": layer.lora_magnitude_vector}
    return {name: part["default"].weight for name, part in parts.items() if "default" in part}


def like_peft(model: nn.Module, **rules) -> tuple[nn.Module, nn.Module]:
    """Return the model with LoRA, and a copy with PEFT's LoRA. Their adapters have equal values that are not zero."""
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**rules))
    apply_lora(model, **rules)
    ours = {n: m for n, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    layers = peft_layers(theirs)
    assert set(ours) == set(layers)
    with torch.no_grad():
        for name, layer in ours.items():
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape) / 4)
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape) / 4)
            if layer.use_dora:
                layer.lora_magnitude_vector.mul_(0.5 + torch.rand(layer.out_features))
            for part, parameter in same_in_peft(layers[name]).items():
                parameter.copy_(getattr(layer, part))
    return model, theirs


def run(model: nn.Module, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if kind == "plain":
        return model(torch.randn(5, 6, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype))
    return model(input_ids=torch.randint(32, (2, 7), generator=generator)).logits
