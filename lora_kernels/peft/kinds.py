"""The classes of PEFT's layers that have a fused class, and where it is. A module of these is imported only where a
model has such a layer."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from lora_kernels.peft.layer import FusedLayer

_LINEAR = "peft.tuners.lora.layer.Linear"

_FUSED = {
    _LINEAR: ("linear", "FusedLinear"),
    "peft.tuners.lora.layer.Embedding": ("embedding", "FusedEmbedding"),
    "peft.tuners.lora.layer.Conv1d": ("conv", "FusedConv1d"),
    "peft.tuners.lora.layer.Conv2d": ("conv", "FusedConv2d"),
    "peft.tuners.lora.layer.Conv3d": ("conv", "FusedConv3d"),
    "peft.tuners.lora.layer.MultiheadAttention": ("attention", "FusedMultiheadAttention"),
    "peft.tuners.lora.bnb.Linear4bit": ("bnb", "FusedLinear4bit"),
    "peft.tuners.lora.bnb.Linear8bitLt": ("bnb", "FusedLinear8bitLt"),
    "peft.tuners.adalora.layer.SVDLinear": ("folded", "FusedSVDLinear"),
    "peft.tuners.adalora.bnb.SVDLinear4bit": ("folded_bnb", "FusedSVDLinear4bit"),
    "peft.tuners.adalora.bnb.SVDLinear8bitLt": ("folded_bnb", "FusedSVDLinear8bitLt"),
    "peft.tuners.delora.layer.DeloraLinear": ("folded", "FusedDeloraLinear"),
    "peft.tuners.vera.layer.Linear": ("vera", "FusedVeraLinear"),
    "peft.tuners.lora.layer.ParamWrapper": ("experts", "FusedExperts"),
    "peft.tuners.lora.aqlm.AqlmLoraLinear": ("around", "FusedAqlmLoraLinear"),
    "peft.tuners.lora.awq.AwqLoraLinear": ("around", "FusedAwqLoraLinear"),
    "peft.tuners.lora.eetq.EetqLoraLinear": ("around", "FusedEetqLoraLinear"),
    "peft.tuners.lora.gptq.GPTQLoraLinear": ("around", "FusedGPTQLoraLinear"),
    "peft.tuners.lora.hqq.HqqLoraLinear": ("around", "FusedHqqLoraLinear"),
    "peft.tuners.lora.inc.IncLoraLinear": ("around", "FusedIncLoraLinear"),
    "peft.tuners.lora.torchao.TorchaoLoraLinear": ("around", "FusedTorchaoLoraLinear"),
}
"""PEFT's class → the module in this folder, and the fused class in it."""

_LEFT = {
    "peft.tuners.gralora.layer.Linear": (
        "GraLoRA: as A and B its blocks have rank k·r, mostly zeros, and take k times the work of its own form"
    ),
}
"""PEFT's class → why its layers are left to PEFT, where the name of the class would not say it."""


def is_known(kind: type) -> bool:
    """Return whether PEFT's class `kind` has a fused class, is one, or is left to PEFT for a known reason."""
    return issubclass(kind, FusedLayer) or _name(kind) in _FUSED or _name(kind) in _LEFT


def fused_kind(kind: type, layer: Any = None) -> type[FusedLayer] | str:
    """Return the fused class that replaces PEFT's class `kind`, or why none may. A fused `kind` is returned itself.
    `layer` is the layer of this class: over a base with a forward of its own, PEFT's linear is fused around it."""
    if issubclass(kind, FusedLayer):
        return kind
    if (left := _LEFT.get(_name(kind))) is not None:
        return left
    place = _FUSED.get(_name(kind))
    if layer is not None and place is not None and _may_hold_codes(place, layer):
        codes = importlib.import_module("lora_kernels.peft.codes").class_for(kind, layer)
        if codes is not None:
            return codes.why_not_forward() or codes
    if layer is not None and _name(kind) == _LINEAR and _computes_itself(layer):
        place = "around", "FusedLinearAround"
    if place is None:
        return f"a {kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__}, not a plain linear"
    module, name = place
    found: type[FusedLayer] = getattr(importlib.import_module(f"lora_kernels.peft.{module}"), name)
    return found.why_not_forward() or found


def _may_hold_codes(place: tuple[str, str], layer: Any) -> bool:
    """Return whether the base of `layer` may hold codes that the kernels read, which `class_for` then finds out."""
    weight = layer._modules["base_layer"]._parameters.get("weight")
    return place[0] == "around" or (place == _FUSED[_LINEAR] and type(weight).__module__.startswith("torchao."))


def _computes_itself(layer: Any) -> bool:
    """Return whether the base of `layer`, a linear layer of PEFT, is an nn.Linear whose product only its own forward
    knows: a subclass that overrides it, or one whose weight is a quantised tensor of torchao."""
    base = layer._modules["base_layer"]
    if not isinstance(base, nn.Linear):
        return False
    return type(base).forward is not nn.Linear.forward or type(base.weight).__module__.startswith("torchao.")


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
