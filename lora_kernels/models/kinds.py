"""The layers with an adapter: those of a model, and the classes that take the places of plain layers."""

from __future__ import annotations

import importlib
from typing import cast

from torch import nn

from lora_kernels.models.names import plain_names
from lora_kernels.nn import fit
from lora_kernels.nn.adapter import AdapterLayer

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "linear.FusedLoRALinear"),
    (nn.Embedding, "embedding.FusedLoRAEmbedding"),
    (nn.Conv1d, "conv.FusedLoRAConv1d"),
    (nn.Conv2d, "conv.FusedLoRAConv2d"),
    (nn.Conv3d, "conv.FusedLoRAConv3d"),
    (nn.MultiheadAttention, "attention.FusedLoRAMultiheadAttention"),
    (fit.Conv1DLike, "conv1d.FusedLoRAConv1D"),
)
"""The class for each class of plain layers, by its path in lora_kernels.nn. A path is imported when a model has such a
layer among its targets."""

_EXPERTS = "experts.FusedLoRAExperts"
"""The class for modules of experts. They have no class in common, and are found by the names of their parameters."""


def lora_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return every layer with an adapter in `model` by its first name, without the names of wrappers. One that is a
    part of another is left out."""
    layers: dict[str, AdapterLayer] = {}
    parts: set[int] = set()
    for name, _, module in plain_names(model):
        if isinstance(module, AdapterLayer) and id(module) not in parts:
            layers[name] = module
            parts.update(map(id, module.modules()))
    return layers


def kind_of(module: nn.Module) -> type[AdapterLayer] | None:
    """Return the class of layers that can take the place of `module`, or None where there is none. Whether it can take
    the place of this very module, its `why_not` says."""
    return next((_loaded(path) for plain, path in _KINDS if isinstance(module, plain)), None)


def kind_of_parameters(module: nn.Module, parameters: tuple[str, ...]) -> type[AdapterLayer] | None:
    """Return the class of layers that adapt these parameters of `module`, each on its own."""
    if isinstance(module, nn.Linear):  # LoRA on the weight of a linear layer is LoRA on the layer, also in PEFT's files
        return kind_of(module) if parameters == ("weight",) else None
    return _loaded(_EXPERTS)


def why_not(kind: type[AdapterLayer] | None, module: nn.Module) -> str:
    """Return why no layer of class `kind` can take the place of `module` in a model; "" where one can."""
    if kind is not None:
        return kind.why_not(module)
    if "Linear" in type(module).__name__:
        return fit.why_not(module, in_place=True)
    return (
        f"a {type(module).__name__}, and adapters go on linear layers, embeddings, convolutions, nn.MultiheadAttention "
        "and, by target_parameters, on experts"
    )


def _loaded(path: str) -> type[AdapterLayer]:
    module, _, name = path.partition(".")
    return cast("type[AdapterLayer]", getattr(importlib.import_module(f"lora_kernels.nn.{module}"), name))
