"""Adapters on disk whose updates are known, and the updates of an adapter on disk, by PEFT and in fp64."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


class Mixed(nn.Module):
    """An embedding, two linear layers, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.mlp = nn.Sequential(OrderedDict(q=nn.Linear(12, 14), v=nn.Linear(14, 9)))
        self.conv = nn.Conv1d(9, 11, 3)
        self.head = nn.Linear(11, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.mlp(self.emb(ids)).tanh().transpose(1, 2))
        return self.head(x.mean(2).tanh())


TARGETS = ["emb", "q", "v", "conv"]
IDS = torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(0))


def saved(directory: Path, seed: int = 0, model: nn.Module | None = None, **settings: Any) -> peft.PeftModel:
    """Return a PEFT model with random adapters, which are saved in `directory`."""
    torch.manual_seed(0)
    model = Mixed() if model is None else copy.deepcopy(model)
    dtype = settings.pop("dtype", torch.float32)
    config = peft.LoraConfig(**({"r": 6, "lora_alpha": 9, "target_modules": TARGETS} | settings))
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(0.5 + torch.rand(p.shape))
            elif "lora_" in name:
                p.copy_(torch.randn(p.shape).to(dtype) / 3)
                p.data = p.data.to(dtype)
    adapted.save_pretrained(directory)
    return adapted


def loaded(directory: Path, model: nn.Module | None = None) -> peft.PeftModel:
    """Return the adapter in `directory` on the same model."""
    torch.manual_seed(0)
    return peft.PeftModel.from_pretrained(Mixed() if model is None else copy.deepcopy(model), directory)


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """Return ΔW of each layer by PEFT, in fp64, as a matrix [N, K]."""
    found = {}
    for name, layer in copy.deepcopy(model).double().named_modules():
        if isinstance(layer, LoraLayer):
            with torch.no_grad():
                delta = layer.get_delta_weight("default").flatten(1)
            found[name.removeprefix("base_model.model.")] = delta.T if layer.lora_embedding_A else delta
    return found


def ranks(model: nn.Module) -> dict[str, int]:
    """Return r of each layer of a PEFT model."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {name.removeprefix("base_model.model."): layer.r["default"] for name, layer in layers.items()}


def truncated(delta: Tensor, r: int) -> Tensor:
    """Return the nearest matrix of rank r, by the whole SVD."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :r] * s[:r]) @ vt[:r]


def relative(a: Tensor, b: Tensor) -> float:
    """Return ‖a - b‖ / ‖b‖."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def bits(directory: Path) -> dict[str, bytes]:
    """Return what the files of a directory hold, by name."""
    return (
        {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} if directory.exists() else {}
    )
