"""LoRA at the cost of the frozen layer.

    y = x Wᵀ + bias + (α/r) · (dropout(x) Aᵀ) Bᵀ

in one call, forward and backward.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lora_kernels.dora import dora_linear
from lora_kernels.module import FusedLoRALinear
from lora_kernels.ops import explain, lora_linear
from lora_kernels.quant import QuantizedWeight, dequantize_weight, quantize_weight

if TYPE_CHECKING:
    from lora_kernels.adapters import load_adapter, load_loralib, save_adapter
    from lora_kernels.inject import (
        adapter_parameters,
        apply_lora,
        mark_only_lora_as_trainable,
        merge_and_unload,
        trainable_parameters,
    )
    from lora_kernels.peft import FuseReport, disable, enable, fuse, unfuse
    from lora_kernels.quant_module import QuantizedLoRALinear

__all__ = [
    "FuseReport",
    "FusedLoRALinear",
    "QuantizedLoRALinear",
    "QuantizedWeight",
    "adapter_parameters",
    "apply_lora",
    "dequantize_weight",
    "disable",
    "dora_linear",
    "enable",
    "explain",
    "fuse",
    "load_adapter",
    "load_loralib",
    "lora_linear",
    "mark_only_lora_as_trainable",
    "merge_and_unload",
    "quantize_weight",
    "save_adapter",
    "trainable_parameters",
    "unfuse",
]
__version__ = "0.1.0"

_LAZY = {
    "peft": ("FuseReport", "disable", "enable", "fuse", "unfuse"),
    "inject": (
        "adapter_parameters",
        "apply_lora",
        "mark_only_lora_as_trainable",
        "merge_and_unload",
        "trainable_parameters",
    ),
    "quant_module": ("QuantizedLoRALinear",),
    "adapters": ("load_adapter", "load_loralib", "save_adapter"),
}
"""What is imported where it is first asked for: some of it needs PEFT."""
_HOME = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    """The lazy names."""
    if name in _HOME:
        return getattr(importlib.import_module(f"lora_kernels.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lora_kernels' has no attribute {name!r}")
