"""The models of `benchmarks.generation_many`: one Llama, the same with PEFT's adapters, and that one fused."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_kernels
from benchmarks.generation_models import SCALE, Size, save_model, seeded

BASE, PEFT, FUSED = "base", "PEFT", "PEFT, fused"
ADAPTERS = 32
RANKS = (16, 8, 32, 64)
"""The ranks that the adapters have in turn."""


class Models:
    """The three models, in fp32, over the same weights."""

    def __init__(self, path: str, size: Size) -> None:
        from transformers import AutoModelForCausalLM

        save_model(size, path)
        self.base, *others = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(3))
        for other in others:
            for mine, shared in zip(other.parameters(), self.base.parameters(), strict=True):
                mine.data = shared.data
        self.values = _draw(self.base)
        self.peft, self.fused = (self._adapted(other) for other in others)
        lora_kernels.fuse(self.fused, strict=True)
        self.by_name = {BASE: self.base, PEFT: self.peft, FUSED: self.fused}

    def _adapted(self, base: Any) -> Any:
        """Return the model with PEFT's LoRA, its adapters named "0", "1", and so on."""
        from peft import LoraConfig, get_peft_model

        model: Any = None
        for i in range(ADAPTERS):
            R = RANKS[i % len(RANKS)]
            alpha: Any = SCALE * R  # its type is int there, but it is used as a float
            config = LoraConfig(r=R, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
            if model is None:
                model = get_peft_model(base, config, str(i))
            else:
                model.add_adapter(str(i), config)
        for name, pairs in self.values.items():
            layer: Any = base.get_submodule(name)
            for i, (a, b) in enumerate(pairs):
                layer.lora_A[str(i)].weight.data = a
                layer.lora_B[str(i)].weight.data = b
        return model.eval()

    def exact(self, ids: Tensor) -> nn.Module:
        """Return the model in fp64, whose row m has adapter ids[m]. It is plain torch. (transformers computes its norms
        in fp32 nevertheless.)"""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_config(self.base.config, dtype=torch.float64).eval()
        model.load_state_dict(self.base.state_dict())
        for name, pairs in self.values.items():
            parent, _, last = name.rpartition(".")
            used = {int(i): pairs[i] for i in ids.unique()}
            setattr(model.get_submodule(parent), last, _Exact(model.get_submodule(name).weight, used, ids))
        return model


class _Exact(nn.Module):
    """x Wᵀ + s · (x Aᵀ) Bᵀ in fp64, with the A and B of each row's adapter."""

    def __init__(self, w: Tensor, pairs: dict[int, tuple[Tensor, Tensor]], ids: Tensor) -> None:
        super().__init__()
        self.weight, self.ids = w, ids
        self.pairs = {i: (a.double(), b.double()) for i, (a, b) in pairs.items()}

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        for i, (a, b) in self.pairs.items():
            y[self.ids == i] += SCALE * (x[self.ids == i] @ a.t() @ b.t())
        return y


def _draw(model: Any) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return A and B of every adapter for each linear but the head, such that s·B·A is about half as large as W."""
    generator, found = seeded(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            pairs = []
            for i in range(ADAPTERS):
                (N, K), R = layer.weight.shape, RANKS[i % len(RANKS)]
                a = torch.randn(R, K, generator=generator) / math.sqrt(K)
                pairs.append((a, torch.randn(N, R, generator=generator) * (0.5 / (SCALE * math.sqrt(R)))))
            found[name] = pairs
    return found
