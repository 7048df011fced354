"""LoRA in one call, forward and backward.

y = x Wᵀ + bias + (α/r) · (dropout(x) Aᵀ) Bᵀ
"""

import importlib
from typing import TYPE_CHECKING, Any

from lora_kernels.core.version import __version__

_torch_error: Exception | None = None
try:
    importlib.import_module("torch")
except Exception as error:  # not installed, or not loading: the package can be imported, so that `doctor` can say so
    _torch_error = error
else:
    from lora_kernels.nn import FusedLoRALinear, QuantizedLoRALinear
    from lora_kernels.ops.dora import dora_linear
    from lora_kernels.ops.linear import explain, lora_linear
    from lora_kernels.quant.weight import QuantizedWeight, dequantize_weight, quantize_weight

if TYPE_CHECKING:
    from lora_kernels.analysis.usage import usage
    from lora_kernels.analysis.used import Usage
    from lora_kernels.core.many import Adapter, AdapterStack
    from lora_kernels.core.rows import Rows
    from lora_kernels.models.adapters import load_adapter, save_adapter
    from lora_kernels.models.diffusers_files import load_diffusers
    from lora_kernels.models.inject import (
        adapter_parameters,
        apply_lora,
        mark_only_lora_as_trainable,
        merge_and_unload,
        trainable_parameters,
    )
    from lora_kernels.models.loralib import load_loralib
    from lora_kernels.models.lycoris import load_lycoris
    from lora_kernels.models.residual import apply_reslora
    from lora_kernels.models.residual_files import load_reslora, save_reslora
    from lora_kernels.models.residual_merging import reslora_to_lora
    from lora_kernels.models.shared import apply_tied_lora, apply_vera
    from lora_kernels.nn.attention import FusedLoRAMultiheadAttention
    from lora_kernels.nn.conv import FusedLoRAConv1d, FusedLoRAConv2d, FusedLoRAConv3d
    from lora_kernels.nn.conv1d import FusedLoRAConv1D
    from lora_kernels.nn.embedding import FusedLoRAEmbedding
    from lora_kernels.nn.experts import FusedLoRAExperts
    from lora_kernels.nn.mixed import mixed
    from lora_kernels.nn.parallel import ColwiseLoRA, RowwiseLoRA
    from lora_kernels.ops.conv import lora_conv
    from lora_kernels.ops.embedding import lora_embedding
    from lora_kernels.ops.experts import lora_linear_experts
    from lora_kernels.ops.group import lora_linear_group
    from lora_kernels.ops.multi import lora_linear_multi
    from lora_kernels.peft.enabling import disable, enable, register
    from lora_kernels.peft.fusing import FuseReport, fuse, unfuse
    from lora_kernels.peft.merged_models import merge_losses, merged_bytes, unmerge_written
    from lora_kernels.serving.pool import AdapterPool

__all__ = [
    "Adapter",
    "AdapterPool",
    "AdapterStack",
    "ColwiseLoRA",
    "FuseReport",
    "FusedLoRAConv1D",
    "FusedLoRAConv1d",
    "FusedLoRAConv2d",
    "FusedLoRAConv3d",
    "FusedLoRAEmbedding",
    "FusedLoRAExperts",
    "FusedLoRALinear",
    "FusedLoRAMultiheadAttention",
    "QuantizedLoRALinear",
    "QuantizedWeight",
    "Rows",
    "RowwiseLoRA",
    "Usage",
    "__version__",
    "adapter_parameters",
    "apply_lora",
    "apply_reslora",
    "apply_tied_lora",
    "apply_vera",
    "dequantize_weight",
    "disable",
    "dora_linear",
    "enable",
    "explain",
    "fuse",
    "load_adapter",
    "load_diffusers",
    "load_loralib",
    "load_lycoris",
    "load_reslora",
    "lora_conv",
    "lora_embedding",
    "lora_linear",
    "lora_linear_experts",
    "lora_linear_group",
    "lora_linear_multi",
    "mark_only_lora_as_trainable",
    "merge_and_unload",
    "merge_losses",
    "merged_bytes",
    "mixed",
    "quantize_weight",
    "register",
    "reslora_to_lora",
    "save_adapter",
    "save_reslora",
    "trainable_parameters",
    "unfuse",
    "unmerge_written",
    "usage",
]

_LAZY = {
    "peft.merged_models": ("merge_losses", "merged_bytes", "unmerge_written"),
    "analysis.usage": ("usage",),
    "analysis.used": ("Usage",),
    "core.many": ("Adapter", "AdapterStack"),
    "core.rows": ("Rows",),
    "nn.embedding": ("FusedLoRAEmbedding",),
    "ops.embedding": ("lora_embedding",),
    "models.adapters": ("load_adapter", "save_adapter"),
    "models.inject": (
        "adapter_parameters",
        "apply_lora",
        "mark_only_lora_as_trainable",
        "merge_and_unload",
        "trainable_parameters",
    ),
    "models.loralib": ("load_loralib",),
    "models.diffusers_files": ("load_diffusers",),
    "models.lycoris": ("load_lycoris",),
    "models.shared": ("apply_tied_lora", "apply_vera"),
    "models.residual": ("apply_reslora",),
    "models.residual_files": ("load_reslora", "save_reslora"),
    "models.residual_merging": ("reslora_to_lora",),
    "nn.conv": ("FusedLoRAConv1d", "FusedLoRAConv2d", "FusedLoRAConv3d"),
    "nn.conv1d": ("FusedLoRAConv1D",),
    "nn.attention": ("FusedLoRAMultiheadAttention",),
    "nn.experts": ("FusedLoRAExperts",),
    "nn.mixed": ("mixed",),
    "nn.parallel": ("ColwiseLoRA", "RowwiseLoRA"),
    "ops.experts": ("lora_linear_experts",),
    "ops.conv": ("lora_conv",),
    "ops.group": ("lora_linear_group",),
    "ops.multi": ("lora_linear_multi",),
    "peft.enabling": ("disable", "enable", "register"),
    "peft.fusing": ("FuseReport", "fuse", "unfuse"),
    "serving.pool": ("AdapterPool",),
}
"""The names that are imported when they are first asked for, by module. They need PEFT, or few programs use them."""
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}
_DOORS = ("analysis", "group", "initialise", "jobs", "parallel", "serving", "train")
"""The public modules that are imported when they are first asked for, as in `lora_kernels.initialise.pissa`."""


def torch_fault() -> str:
    """Return why torch cannot be imported, or "" where it can. Without torch every name of this package raises
    ImportError with this text, and the command `doctor` reports it."""
    if _torch_error is None:
        return ""
    return f"torch cannot be imported ({type(_torch_error).__name__}: {_torch_error})"


def __getattr__(name: str) -> Any:
    """Return a name of `_LAZY` or a module of `_DOORS`, importing it when it is first asked for."""
    if _torch_error is not None and (name in __all__ or name in _DOORS):
        raise ImportError(f"{name} of lora_kernels needs torch: {torch_fault()}. pip install torch") from _torch_error
    if name in _DOORS:
        return importlib.import_module(f"lora_kernels.{name}")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"lora_kernels.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'lora_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, also those that are imported when they are first asked for."""
    return sorted({*globals(), *__all__, *_DOORS})
