"""The classes of PEFT's layers that have a fused class, and where it is. A module of these is imported only where a
model has such a layer."""

from __future__ import annotations

import importlib

from lora_kernels.peft.layer import FusedLayer

_FUSED = {
    "peft.tuners.lora.layer.Linear": ("linear", "FusedLinear"),
    "peft.tuners.lora.bnb.Linear4bit": ("bnb", "FusedLinear4bit"),
    "peft.tuners.lora.bnb.Linear8bitLt": ("bnb", "FusedLinear8bitLt"),
    "peft.tuners.lora.layer.ParamWrapper": ("experts", "FusedExperts"),
}
"""PEFT's class → the module in this folder, and the fused class in it."""


def is_known(kind: type) -> bool:
    """Return whether PEFT's class `kind` has a fused class, or is one."""
    return issubclass(kind, FusedLayer) or _name(kind) in _FUSED


def fused_kind(kind: type) -> type[FusedLayer] | str:
    """Return the fused class that replaces PEFT's class `kind`, or why none may. A fused `kind` is returned itself."""
    if issubclass(kind, FusedLayer):
        return kind
    if (place := _FUSED.get(_name(kind))) is None:
        return f"a {kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__}, not a plain linear"
    module, name = place
    found: type[FusedLayer] = getattr(importlib.import_module(f"lora_kernels.peft.{module}"), name)
    return found.why_not_forward() or found


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
