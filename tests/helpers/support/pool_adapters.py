"""Adapters for a pool, and what a model computes with each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from support.adapter_models import adapted, net
from torch import Tensor, nn

from lora_kernels.models.adapters import save_adapter

LAYERS = ("inner.fc", "inner.out", "head")


def base() -> nn.Module:
    """Return a model with four linear layers, always with the same values."""
    torch.manual_seed(0)
    return net(torch.float64).requires_grad_(False)


def saved(directory: Path, seed: int, **rules: Any) -> nn.Module:
    """Save an adapter for `base`, and return the model with it."""
    torch.manual_seed(1000 + seed)
    model = adapted(base(), **({"r": 4, "lora_alpha": 6, "target_modules": list(LAYERS)} | rules)).eval()
    save_adapter(model, directory)
    return model


def given(seed: int, r: int = 4, layers: tuple[str, ...] = LAYERS) -> dict[str, Tensor]:
    """Return the state dict of an adapter for `base`."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in layers:
        linear = base().get_submodule(name)
        for part, shape in (("A", (r, linear.in_features)), ("B", (linear.out_features, r))):
            values = torch.randn(shape, generator=generator, dtype=torch.float64) / 3
            found[f"base_model.model.{name}.lora_{part}.weight"] = values
    return found


def with_given(state: dict[str, Tensor], scale: float) -> nn.Module:
    """Return `base` with W + s·B A as its weights."""
    model = copy.deepcopy(base())
    for key, a in state.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(name).weight += scale * state[key.replace("lora_A", "lora_B")] @ a
    return model


def batches(count: int, M: int = 6) -> Iterator[Tensor]:
    """Yield inputs of `base`."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        yield torch.randn(M, 5, generator=generator, dtype=torch.float64)
