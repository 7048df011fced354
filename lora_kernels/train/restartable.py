"""Which adapters of a model can go into their base weights, and the mark that they have."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import plain_names
from lora_kernels.models.pairs import EMBEDDING, Pair, lies_in_memory_of, pairs, told_others
from lora_kernels.models.targets import some, told_by_reason
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.tied import TiedLoRALinear
from lora_kernels.train import sharded
from lora_kernels.train.base_weights import Update, update_of

RESTARTED = "restarted"
"""What `AdapterLayer.init` is after a restart: the adapter is valid with this module's base only."""
PEFT_MARK = "relora"
"""What ``init_lora_weights`` in PEFT's config is after a restart. PEFT refuses to load such an adapter alone."""

_KINDS = frozenset(
    f"lora_kernels.nn.{name}"
    for name in ("linear", "quantized", "tied", "conv1d", "embedding", "conv", "attention", "experts", "parallel")
)
"""The modules of the layers whose update is s·B A of their own A and B, or of those of the embedding that they are tied
to."""


def updates_of(model: nn.Module) -> tuple[list[Update], tuple[str, ...]]:
    """Return the updates that are trained, and the names of the layers whose adapters are frozen.

    Raises ValueError where one cannot go into its weight, naming every such layer and the reason.
    """
    _refuse_fsdp1(model)
    updates, left, reasons = [], [], {name: why for name, layer in lora_layers(model).items() if (why := _kind(layer))}
    for pair in pairs(model) if not reasons else ():
        if not (pair.a.requires_grad or pair.b.requires_grad):
            left.append(pair.name)
            continue
        found = update_of(pair)
        if isinstance(found, str):
            reasons[pair.name or type(pair.layer).__name__] = found
        else:
            updates.append(found)
    if reasons:
        raise ValueError(f"restart cannot add the adapters of these layers to their weights: {told_by_reason(reasons)}")
    if not updates:
        frozen = f"; those of {some(left)} are frozen" if left else ""
        raise ValueError(f"the model has no trained adapter{frozen}. Nothing was changed{told_others(model)}")
    _refuse_shared(model, updates)
    over = [update.name for update in updates if update.overflows()]
    if over:
        raise ValueError(
            f"W + s·B·A of {some(over)} is not finite in {updates[0].weight.dtype}: nothing was changed. Look at A, B"
        )
    return updates, tuple(left)


def _kind(layer: AdapterLayer) -> str:
    """Return why the update of `layer` is not that of its own A and B; "" where it is."""
    kind = next(each for each in type(layer).__mro__ if each.__module__.startswith("lora_kernels."))
    if kind.__module__ in _KINDS:  # FSDP2 and parametrizations make subclasses elsewhere
        return ""
    return f"a {kind.__name__}, whose update is not made of an A and a B of its own alone"


def mark(model: nn.Module, updates: Iterable[Update]) -> list[str]:
    """Mark the layers, and PEFT's configs, so that the adapters are not taken for ones of the first base. Return the
    names of PEFT's adapters that were not marked before."""
    names = set()
    for update in updates:
        if isinstance(update.pair.layer, AdapterLayer):
            update.pair.layer.init = RESTARTED
        else:
            names.add(update.pair.adapter)
    new = set()
    for module in model.modules() if names else ():
        configs: Any = getattr(module, "peft_config", None)
        for name in names.intersection(configs) if isinstance(configs, dict) else ():
            if configs[name].init_lora_weights != PEFT_MARK:
                configs[name].init_lora_weights = PEFT_MARK
                new.add(name)
    return sorted(new)


def _refuse_fsdp1(model: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is wrapped by FSDP1, which keeps weights, and the optimiser's states, as flat parts of several "
            "layers: nothing was changed. Use FSDP2, torch.distributed.fsdp.fully_shard"
        )


def _refuse_shared(model: nn.Module, updates: list[Update]) -> None:
    """Raise ValueError where another module reads a weight that would be changed, but for a head that shares the
    adapter of its embedding as well."""
    readers: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, _, module in plain_names(model):
        for p in module._parameters.values():
            if p is not None and p.numel() and not p.is_meta:
                readers.setdefault(_address(p), []).append((name, module))
    for update in updates:
        layer: Any = update.pair.layer
        base = layer if isinstance(layer, AdapterLayer) else layer.get_base_layer()
        own = {id(layer), id(base), id(getattr(base, "out_proj", None)), *_tied(model, update.pair)}
        others = [name for name, module in readers.get(_address(update.weight), ()) if id(module) not in own]
        if others:
            raise ValueError(
                f"the weight of {update.name} is that of {some(others)} too, which would change by an update it does "
                "not have: nothing was changed. Give each a weight of its own, or tie the adapters as well "
                "(ensure_weight_tying)"
            )


def _tied(model: nn.Module, pair: Pair) -> set[int]:
    """Return the heads that share the weight and the adapter of the embedding of `pair`."""
    found: set[int] = set()
    if pair.kind != EMBEDDING:
        return found
    peft = sys.modules.get("peft.tuners.lora.layer")
    for module in model.modules():
        if isinstance(module, TiedLoRALinear):
            if module.lora_B is pair.a:
                found.add(id(module))
        elif peft is not None and isinstance(module, peft.LoraLayer) and pair.adapter in module.lora_A:
            head: Any = module
            if lies_in_memory_of(head.lora_A[pair.adapter].weight, [pair.b]):
                found.add(id(head.get_base_layer()))
    return found


def _address(p: nn.Parameter) -> int:
    return sharded.local(p).data_ptr()
