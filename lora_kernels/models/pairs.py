"""`pairs`: the low-rank updates of a model, of this package's layers and of PEFT's alike.

What trains, restarts or looks into adapters finds them here, by what each matrix is, and not by the names of
parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import plain_names
from lora_kernels.models.targets import told_by_reason
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.attention import OUT_PROJ_COUNTED
from lora_kernels.nn.tied import TiedLoRALinear

LINEAR, EMBEDDING, CONV, EXPERTS, ATTENTION = "linear", "embedding", "conv", "experts", "attention"
"""The kinds of layers, as `Pair.kind` names them."""

_PLAIN_VARIANTS = ("Dora", "ALora", "Velora", "MiCA")
"""How the names of those variants of PEFT's LoRA begin whose update is s·B A."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A and B of one low-rank update s·B A."""

    name: str
    """The plain name of the layer in the model. Of two stacks of experts, PEFT has one at "….base_layer"."""
    layer: nn.Module
    """The layer with the adapter: an `AdapterLayer`, or a layer of PEFT, fused or not."""
    adapter: str
    """PEFT's name of the adapter, such as "default"; "" for an `AdapterLayer`, which has one."""
    kind: str
    """LINEAR, EMBEDDING, CONV, EXPERTS or ATTENTION: what the layer is."""
    part: str
    """Which update of the layer it is, where it has several or names its parameter: "out_proj", "gate_up_proj", ...;
    else ""."""
    a: nn.Parameter
    """The matrix that reads x, in the layer's own layout. That of an embedding starts at zero; every other starts at
    random, if the initialisation does not say otherwise."""
    b: nn.Parameter
    """The matrix that makes y, in the layer's own layout. It starts at zero, but at random in an embedding."""
    magnitude: nn.Parameter | None = None
    """DoRA's m."""
    groups: int = 1
    """The number of updates that the two hold side by side: the experts of a stack, the groups of a convolution."""
    counted: int = 1
    """How often the layer adds the update: 2 for the out_proj of an attention of PEFT, else 1."""

    @property
    def scale(self) -> float:
        """s, by which the layer multiplies B A now, times `counted`. It is read from the layer, where it may change."""
        scaling: Any = self.layer.scaling
        return float(scaling[self.adapter] if isinstance(scaling, dict) else scaling) * self.counted

    @property
    def zero_at_start(self) -> nn.Parameter:
        """The matrix that starts at zero: B, and of an embedding A."""
        return self.a if self.kind == EMBEDDING else self.b

    @property
    def random_at_start(self) -> nn.Parameter:
        """The matrix that starts at random: A, and of an embedding B."""
        return self.b if self.kind == EMBEDDING else self.a

    def as_a(self, t: Tensor) -> Tensor:
        """Return t, which is laid out as `a`, as A [groups, R, K]: a view where t is contiguous. K of a convolution
        counts the channels and the kernel, K of an embedding is the size of the vocabulary."""
        if self.kind == EMBEDDING and isinstance(self.layer, AdapterLayer):
            return t.t()[None]
        rows = t.flatten(1) if self.kind == CONV else t.reshape(-1, t.shape[-1])
        return rows.reshape(self.groups, rows.shape[0] // self.groups, rows.shape[1])

    def as_b(self, t: Tensor) -> Tensor:
        """Return t, which is laid out as `b`, such as a gradient of it, as B [groups, N, R]: a view where t is
        contiguous."""
        if self.kind != EXPERTS:
            return t.reshape(self.groups, t.shape[0] // self.groups, t.shape[1])
        if isinstance(self.layer, AdapterLayer):
            return t
        return t.reshape(t.shape[0], -1, self.groups).permute(2, 0, 1)  # PEFT has the expert as the fastest dimension


def pairs(model: nn.Module, adapter: str | None = None) -> list[Pair]:
    """Return every low-rank update of `model`, in the order of its modules.

    `adapter` chooses one of PEFT's adapters by its name; None takes all of them. Layers of other methods of PEFT than
    LoRA (AdaLoRA, LoHa, VeRA, ...), and layers of this package whose factors belong to many layers (VeRA, Tied-LoRA),
    have no such updates and are left out. A head that is tied to an embedding and shares its adapter has none of its
    own either: the update of both is the embedding's.

    Raises:
        ValueError: for a variant of PEFT's LoRA whose update is no s·B A (KaSA, BD-LoRA, QA-LoRA, Arrow, MonteCLoRA);
            where A or B of a layer is no parameter of its own, because it is parametrised, pruned or flattened.
        KeyError: where the model has adapters of PEFT, and none is called `adapter`.
        TypeError: where `model` is no module.
    """
    check_module(model)
    own = {id(layer): name for name, layer in lora_layers(model).items()}
    peft = sys.modules.get("peft.tuners.lora.layer")  # no layer is PEFT's while nobody has imported it
    found: list[Pair] = []
    twice: set[int] = set()
    for name, _, module in plain_names(model):
        if id(module) in own:
            found += _of_own(name, module)
        elif peft is not None and isinstance(module, peft.LoraLayer):
            if isinstance(module, peft.MultiheadAttention):
                twice.add(id(module.get_base_layer().out_proj))  # type: ignore[no-untyped-call, operator]
            found += _of_peft(name, module, OUT_PROJ_COUNTED if id(module) in twice else 1)
    names = list(dict.fromkeys(pair.adapter for pair in found if pair.adapter))
    if adapter is not None and names and adapter not in names:
        raise KeyError(f"no adapter is called {adapter!r}; the model has {', '.join(names)}")
    tables = [pair for pair in found if pair.kind == EMBEDDING]
    chosen = [pair for pair in found if adapter is None or pair.adapter in (adapter, "")]
    return [pair for pair in chosen if not _tied(pair, tables)]


def check_module(model: Any) -> None:
    """Raise TypeError where `model` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module with adapters, got a {type(model).__name__}")


def told_others(model: nn.Module) -> str:
    """Return the end of an error that finds no pair in `model`: the layers with adapters of other methods, such as
    VeRA; "" where there are none."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    lora = sys.modules.get("peft.tuners.lora.layer")
    kinds: dict[str, str] = {}
    for name, _, module in plain_names(model):
        shared = isinstance(module, AdapterLayer) and "lora_u" in module._parameters
        of_peft = tuners is not None and isinstance(module, tuners.BaseTunerLayer)
        if shared or (of_peft and not (lora is not None and isinstance(module, lora.LoraLayer))):
            kinds[name or "the model"] = f"a {type(module).__name__}, which has no A and B of its own"
    return f". It has adapters of another method: {told_by_reason(kinds)}" if kinds else ""


def _of_own(name: str, layer: Any) -> Iterator[Pair]:
    """Yield the updates of an `AdapterLayer`."""
    magnitude = layer._parameters.get("lora_magnitude_vector")
    if isinstance(layer, TiedLoRALinear) or "lora_u" in layer._parameters:
        return
    for kind, part, of_a, of_b in _own_names(layer):
        a, b = layer._parameters.get(of_a), layer._parameters.get(of_b)
        if a is None or b is None:
            raise ValueError(
                f"{of_a if a is None else of_b} of {name or 'the model'}, a {type(layer).__name__}, is no parameter of "
                "the layer: it is parametrised, pruned or flattened. Make that permanent first "
                "(remove_parametrizations, prune.remove), or use FSDP2"
            )
        groups = a.shape[0] if kind == EXPERTS else layer.groups if kind == CONV else 1
        yield Pair(name, layer, "", kind, part, a, b, magnitude, groups)


def _own_names(layer: Any) -> Iterator[tuple[str, str, str, str]]:
    """Yield the kind, the part and the names of A and B of each update of an `AdapterLayer`."""
    if layer.target_parameters:
        for part in layer.target_parameters:
            yield EXPERTS, part, f"lora_A_{part}", f"lora_B_{part}"
    elif hasattr(layer, "embedding_dim"):
        yield EMBEDDING, "", "lora_embedding_A", "lora_embedding_B"
    elif hasattr(layer, "in_proj_weight"):
        yield ATTENTION, "", "lora_A", "lora_B"
        yield ATTENTION, "out_proj", "lora_A_out", "lora_B_out"
    else:
        yield (CONV if hasattr(layer, "kernel_size") else LINEAR), "", "lora_A", "lora_B"


def _of_peft(name: str, layer: Any, counted: int) -> Iterator[Pair]:
    """Yield the updates of a LoRA layer of PEFT, one for each of its adapters."""
    base, part = layer.get_base_layer(), getattr(layer, "parameter_name", "")
    kind, groups = LINEAR, 1
    if part:
        if getattr(base, part).dim() == 3:
            kind, groups = EXPERTS, layer.num_experts
    elif hasattr(base, "kernel_size"):
        kind, groups = CONV, base.groups
    elif hasattr(base, "in_proj_weight"):
        kind = ATTENTION
    found = {each: (EMBEDDING, a, layer.lora_embedding_B[each]) for each, a in layer.lora_embedding_A.items()}
    for adapter, a in layer.lora_A.items():
        if hasattr(a, "weight"):  # those of AdaLoRA are no modules
            found[adapter] = kind, a.weight, layer.lora_B[adapter].weight
    for adapter, (of, a, b) in found.items():
        variant = type(layer.lora_variant[adapter]).__name__ if adapter in layer.lora_variant else ""
        if variant and not variant.lstrip("_").startswith(_PLAIN_VARIANTS):
            raise ValueError(
                f"adapter {adapter!r} of {name} is PEFT's {variant}, whose update is no product s·B A of its lora_A "
                "and lora_B"
            )
        vectors = layer.lora_magnitude_vector
        magnitude = vectors[adapter].weight if adapter in vectors else None
        yield Pair(name, layer, adapter, of, part, a, b, magnitude, groups, counted)


def _tied(pair: Pair, tables: list[Pair]) -> bool:
    """Return whether `pair` is that of a head to which PEFT's ensure_weight_tying has given the adapter of one of the
    embeddings `tables`: parameters of its own, in the same memory."""
    if pair.kind != LINEAR:
        return False
    return lies_in_memory_of(pair.a, (each.b for each in tables if each.adapter == pair.adapter))


def lies_in_memory_of(parameter: Tensor, others: Iterable[Tensor]) -> bool:
    """Return whether `parameter` is one of `others`, or another tensor in the memory of one, as PEFT's tied heads have
    them."""
    return any(torch._C._is_alias_of(parameter, other) for other in others)  # type: ignore[attr-defined]
