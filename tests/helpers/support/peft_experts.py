"""PEFT models of experts: a model that is one experts module, with adapters on its stacks, and one step of it."""

from __future__ import annotations

from typing import Any

import peft
import torch
from support.experts import STACKS, Inputs, experts_of
from torch import Tensor, nn

BEFORE_20 = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 20)
"""PEFT 0.19 takes one adapter on parameters, and cannot load one into some models of the latest transformers."""


class Holder(nn.Module):
    """A model that is an experts module alone."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.experts(*args, **kwargs)


def config(names: tuple[str, ...] = STACKS, **settings: Any) -> peft.LoraConfig:
    targets = [f"experts.{name}" for name in names]
    return peft.LoraConfig(**({"r": 3, "lora_alpha": 4, "target_modules": [], "target_parameters": targets} | settings))


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    return model


def wrapped(family: str = "Qwen3Moe", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """Return a PEFT model of one experts module, whose adapters differ from zero."""
    implementation = settings.pop("implementation", "eager")
    sizes = settings.pop("sizes", {})
    module = experts_of(family, dtype, implementation, **sizes)
    return randomise(peft.get_peft_model(Holder(module), config(**settings)))


def outer_of(model: Any) -> Any:
    return model.base_model.model.experts


def step(model: Any, given: Inputs, autocast: bool = False, **kwargs: Any) -> dict[str, Tensor]:
    """Return y and every gradient. The forward may run under autocast to bf16."""
    model.zero_grad(set_to_none=True)
    x, weights = given.x.clone().requires_grad_(), given.weights.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x, given.ids, weights, **kwargs)
    y.backward(given.dy)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad} | grads
