"""Small models with each kind of PEFT's adapters that folds into A' and B', and the ΔW of each by its formula."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import config as lora_config
from support.peft_models import Net, config
from torch import Tensor, nn

NAMES = ("up", "down")
KINDS = ("adalora", "delora", "kasa", "mica", "bdlora")


def config_of(kind: str, p: float = 0.0, **kwargs: Any) -> Any:
    """Return a configuration of PEFT for layers `NAMES`, or skip where this PEFT has no such kind."""
    targets = {"target_modules": list(NAMES)} | kwargs
    if kind == "adalora":
        return peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, lora_dropout=p, total_step=40, **targets)
    if kind == "delora":
        return peft.DeloraConfig(r=4, delora_lambda=3, module_dropout=p, **targets)
    if kind == "bdlora":
        blocks = lora_config.BdLoraConfig(target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=2)
        return config(use_bdlora=blocks, lora_dropout=p, **targets)
    if kind == "kasa":
        if not hasattr(lora_config, "KasaConfig"):
            pytest.skip(f"PEFT {peft.__version__} has no KaSA")
        return config(kasa_config=lora_config.KasaConfig(), lora_dropout=p, **targets)
    if not hasattr(peft.tuners.lora.variants, "MiCALinearVariant"):
        pytest.skip(f"PEFT {peft.__version__} has no MiCA")
    return config(init_lora_weights="mica", lora_dropout=p, **targets)


def make(kind: str, dtype: torch.dtype = torch.float32, p: float = 0.0, net: type[nn.Module] = Net) -> PeftModel:
    """Return a model of PEFT in training mode, whose adapters differ from zero."""
    model = new(kind, dtype, p, net)
    randomise(model)
    return model


def new(kind: str, dtype: torch.dtype = torch.float32, p: float = 0.0, net: type[nn.Module] = Net) -> PeftModel:
    """Return such a model with the first values of its adapters."""
    torch.manual_seed(0)
    wide = kind == "mica" and dtype == torch.float64  # whose initialisation refuses fp64
    model = get_peft_model(net(torch.float32 if wide else dtype), config_of(kind, p)).train()
    return model.double() if wide else model


def randomise(model: nn.Module) -> None:
    """Make every adapter differ from zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_A", "lora_B", "lora_E", "lora_diag")):
                parameter.normal_(0, 0.3)
            elif "lambda" in name:
                parameter.add_(torch.rand_like(parameter))


def layers_of(model: nn.Module) -> list[Any]:
    return [model.base_model.model.get_submodule(name) for name in NAMES]


def delta(kind: str, layer: Any, name: str = "default") -> Tensor:
    """Return ΔW [N, K] in fp64, by the formula of the method."""
    if kind == "adalora":
        a, b, e = (getattr(layer, f"lora_{part}")[name].detach().double() for part in "ABE")
        return b @ (e * a) * layer.scaling[name] / (layer.ranknum[name].item() + 1e-5)
    if kind == "delora":
        a, b = layer.delora_A[name].detach().double(), layer.delora_B[name].detach().double()
        total, norms = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64), layer.delora_w_norm[name].double()
        for i in range(a.shape[0]):
            length = max(a[i].square().sum().sqrt().item(), 1e-4) * max(b[:, i].square().sum().sqrt().item(), 1e-4)
            total += torch.outer(b[:, i], a[i]) / length
        return total * norms * layer.delora_lambda[name].detach().double() / a.shape[0]
    a, b = (_dense(getattr(layer, f"lora_{part}")[name], layer, part) for part in "AB")
    middle = torch.diag(layer.lora_diag[name].detach().double()) if kind == "kasa" else torch.eye(a.shape[0]).double()
    return b @ middle @ a * layer.scaling[name]


def _dense(module: Any, layer: Any, part: str) -> Tensor:
    """Return the matrix that a ``lora_A`` or ``lora_B`` multiplies with: its values of the rows of a unit matrix."""
    size = layer.in_features if part == "A" else module.in_features
    return copy.deepcopy(module).double()(torch.eye(size, dtype=torch.float64)).detach().T
