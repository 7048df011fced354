"""Layers with low-rank adapters that are not PEFT's LoRA: their classes, and what to do about each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lora_kernels.nn.adapter import AdapterLayer

_PART = re.compile(r"lora_(?:a|b|down|up|left|right)\b.*|lora_[ab]_stacked|hada_w1_a|lokr_w1(?:_a)?|oft_blocks", re.I)
"""The names that libraries give to the factors of an adapter, as parameters, buffers or children of its layer."""

_WAYS: tuple[tuple[str, str], ...] = (
    ("loralib.", "load its adapter with lora_kernels.load_loralib"),
    ("torchtune.", "torchtune writes adapters in PEFT's format: load one with lora_kernels.load_adapter"),
    ("lycoris.", "load its adapter with lora_kernels.load_lycoris"),
    ("networks.", "load its adapter with lora_kernels.load_lycoris"),
    ("diffusers.", "load its adapter with PEFT, as in pipe.load_lora_weights(...), and fuse the model then"),
    ("megatron.", "export its adapter to PEFT's format, and load that with PEFT or lora_kernels.load_adapter"),
    ("nemo", "export its adapter to PEFT's format, and load that with PEFT or lora_kernels.load_adapter"),
    ("transformer_engine.", "put PEFT's LoRA on plain linear layers instead"),
    ("litgpt.", "merge it with litgpt, or train with PEFT or lora_kernels.apply_lora instead"),
    ("vllm.", "vLLM takes the kernels of its plug-in, and no fuse"),
    ("peft.tuners.", "fuse serves PEFT's LoRA, AdaLoRA, DeLoRA and VeRA"),
)
"""The beginning of the name of a layer's class, and what to do about such layers."""

_OURS = "they compute with these kernels already, and need no fuse"
_ANY = "save its adapter in PEFT's format, and load that with PEFT or lora_kernels.load_adapter"


def other_layers(model: nn.Module, served: Callable[[nn.Module], bool]) -> dict[str, int]:
    """Return the number of layers with an adapter by the full name of their class, without those that `served` tells
    and what lies inside them."""
    found: Counter[str] = Counter()
    inside: set[int] = set()
    for module in model.modules():  # a layer comes before its parts
        if id(module) in inside:
            continue
        ours = isinstance(module, AdapterLayer)
        taken = served(module)
        if not taken and (ours or _carries_adapter(module)):
            kind = type(module)
            found[f"{kind.__module__}.{kind.__qualname__}"] += 1
            taken = True
        if taken:
            inside.update(map(id, module.modules()))
    return dict(found)


def told(found: Mapping[str, int]) -> str:
    """Return a sentence for the layers that `other_layers` has found, with what to do about them; "" for none."""
    by_way: dict[str, list[str]] = {}
    for name, n in found.items():
        by_way.setdefault(way_out(name), []).append(f"{n} layer{'s' if n > 1 else ''} of {name}")
    return "; ".join(
        f"{', '.join(layers)}: {way}" if way == _OURS else f"{', '.join(layers)}, which fuse does not serve: {way}"
        for way, layers in by_way.items()
    )


def way_out(name: str) -> str:
    """Return what to do about the layers of a class, by its full name."""
    if name.startswith("lora_kernels."):
        return _OURS
    return next((way for start, way in _WAYS if name.startswith(start)), _ANY)


def _carries_adapter(module: nn.Module) -> bool:
    if any(kind.__name__ == "BaseTunerLayer" and kind.__module__.startswith("peft.") for kind in type(module).__mro__):
        return True
    own: Any = module.__dict__
    parts = (*own.get("_parameters", ()), *own.get("_buffers", ()), *own.get("_modules", ()))
    if any(_PART.fullmatch(name) for name in parts):
        return True
    children = own.get("_modules", {})
    of_megatron = type(module).__module__.startswith(("megatron.", "nemo"))
    if of_megatron and {"linear_in", "linear_out"} <= children.keys():
        return True
    return children.get("lora_layer") is not None or "lora_a_stacked" in own  # of diffusers, and of vLLM
