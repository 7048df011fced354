"""How adapters are trained: learning rates by matrix, frozen matrices, restarts and their schedule."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_kernels.train.dropping import adapter_dropout
from lora_kernels.train.gradient_start import lora_ga
from lora_kernels.train.lora_fa import FrozenA, freeze_a
from lora_kernels.train.loraplus import loraplus_groups
from lora_kernels.train.restart import RestartedLayer, RestartReport, restart
from lora_kernels.train.schedule import jagged_cosine

if TYPE_CHECKING:
    from lora_kernels.train.hf_callback import ReLoRACallback
    from lora_kernels.train.lightning_callback import LightningReLoRA

__all__ = [
    "FrozenA",
    "LightningReLoRA",
    "ReLoRACallback",
    "RestartReport",
    "RestartedLayer",
    "adapter_dropout",
    "freeze_a",
    "jagged_cosine",
    "lora_ga",
    "loraplus_groups",
    "restart",
]

_LAZY = {"ReLoRACallback": "hf_callback", "LightningReLoRA": "lightning_callback"}
"""The names that need transformers or Lightning, by module."""


def __getattr__(name: str) -> Any:
    """Return a name of `_LAZY`, importing it when it is first asked for."""
    if name in _LAZY:
        return getattr(importlib.import_module(f"lora_kernels.train.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'lora_kernels.train' has no attribute {name!r}")
