"""LoRA in one call, forward and backward.

y = x Wᵀ + bias + (α/r) · (dropout(x) Aᵀ) Bᵀ
"""

import importlib
from typing import TYPE_CHECKING, Any

from lora_kernels.core.version import __version__
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.ops.dora import dora_linear
from lora_kernels.ops.linear import explain, lora_linear
from lora_kernels.quant.weight import QuantizedWeight, dequantize_weight, quantize_weight

if TYPE_CHECKING:
    from lora_kernels.models.adapters import load_adapter, load_loralib, save_adapter
    from lora_kernels.models.inject import (
        adapter_parameters,
        apply_lora,
        mark_only_lora_as_trainable,
        merge_and_unload,
        trainable_parameters,
    )
    from lora_kernels.nn.parallel import ColwiseLoRA, RowwiseLoRA
    from lora_kernels.nn.quantized import QuantizedLoRALinear
    from lora_kernels.ops.group import lora_linear_group
    from lora_kernels.peft.fusing import FuseReport, disable, enable, fuse, unfuse

__all__ = [
    "ColwiseLoRA",
    "FuseReport",
    "FusedLoRALinear",
    "QuantizedLoRALinear",
    "QuantizedWeight",
    "RowwiseLoRA",
    "__version__",
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
    "lora_linear_group",
    "mark_only_lora_as_trainable",
    "merge_and_unload",
    "quantize_weight",
    "save_adapter",
    "trainable_parameters",
    "unfuse",
]

_HOMES = {
    "models.adapters": ("load_adapter", "load_loralib", "save_adapter"),
    "models.inject": (
        "adapter_parameters",
        "apply_lora",
        "mark_only_lora_as_trainable",
        "merge_and_unload",
        "trainable_parameters",
    ),
    "nn.parallel": ("ColwiseLoRA", "RowwiseLoRA"),
    "nn.quantized": ("QuantizedLoRALinear",),
    "ops.group": ("lora_linear_group",),
    "peft.fusing": ("FuseReport", "disable", "enable", "fuse", "unfuse"),
}
"""The names that are imported when they are first asked for, by module: they need PEFT or are rarely used."""
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("group", "initialise", "parallel")
"""The public modules that are imported when they are first asked for, as in `lora_kernels.initialise.pissa`."""


def __getattr__(name: str) -> Any:
    """Import a name of `_HOMES` or a module of `_MODULES` when it is first asked for."""
    if name in _MODULES:
        return importlib.import_module(f"lora_kernels.{name}")
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"lora_kernels.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'lora_kernels' has no attribute {name!r}")
