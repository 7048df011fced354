"""`pairs`: the low-rank updates of a model, of this package's layers and of PEFT's alike.

What trains, restarts or looks into adapters finds them here, by what each matrix is, and not by the names of
parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import plain_names
from lora_kernels.nn.adapter import AdapterLayer

LINEAR, EMBEDDING, CONV, EXPERTS, ATTENTION = "linear", "embedding", "conv", "experts", "attention"
"""The kinds of layers, as `Pair.kind` names them."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A and B of one low-rank update s·B A."""

    name: str
    """The plain name of the layer in the model."""
    layer: nn.Module
    """The layer with the adapter: an `AdapterLayer`, or a layer of PEFT, fused or not."""
    adapter: str
    """PEFT's name of the adapter, such as "default"; "" for an `AdapterLayer`, which has one."""
    kind: str
    """LINEAR, EMBEDDING, CONV, EXPERTS or ATTENTION: what the layer is."""
    part: str
    """Which update of the layer it is, where it has several: "out_proj", "gate_up_proj", ...; else ""."""
    a: nn.Parameter
    """The matrix that reads x, in the layer's own layout. That of an embedding starts at zero; every other starts at
    random."""
    b: nn.Parameter
    """The matrix that makes y, in the layer's own layout. It starts at zero, but at random in an embedding."""
    scale: float
    """s, as the layer multiplies with it now."""
    magnitude: nn.Parameter | None = None
    """DoRA's m."""

    @property
    def zero_at_start(self) -> nn.Parameter:
        """The matrix that starts at zero: B, and of an embedding A."""
        return self.a if self.kind == EMBEDDING else self.b

    @property
    def random_at_start(self) -> nn.Parameter:
        """The matrix that starts at random: A, and of an embedding B."""
        return self.b if self.kind == EMBEDDING else self.a


def pairs(model: nn.Module, adapter: str | None = None) -> list[Pair]:
    """Return every low-rank update of `model`, in the order of its modules.

    `adapter` chooses one of PEFT's adapters by its name; None takes all of them. Layers of PEFT of other methods than
    LoRA (LoHa, VeRA, ...) have no such updates and are left out.
    """
    own = {id(layer): name for name, layer in lora_layers(model).items()}
    peft = sys.modules.get("peft.tuners.lora.layer")  # no layer is PEFT's while nobody has imported it
    found: list[Pair] = []
    for name, _, module in plain_names(model):
        if id(module) in own:
            found += _of_own(name, module)
        elif peft is not None and isinstance(module, peft.LoraLayer):
            found += [pair for pair in _of_peft(name, module) if adapter in (None, pair.adapter)]
    return found


def _of_own(name: str, layer: Any) -> Iterator[Pair]:
    """Yield the updates of an `AdapterLayer`."""
    assert isinstance(layer, AdapterLayer)
    magnitude = layer._parameters.get("lora_magnitude_vector")
    for own, parameter in layer.named_parameters(recurse=False):
        if own == "lora_embedding_A" or own.startswith("lora_A"):
            b = getattr(layer, own.replace("_A", "_B"))
            part = own.removeprefix("lora_A").removeprefix("_")
            if own == "lora_embedding_A":
                kind, part = EMBEDDING, ""
            elif layer.target_parameters:
                kind = EXPERTS
            elif hasattr(layer, "kernel_size"):
                kind = CONV
            else:
                kind = ATTENTION if hasattr(layer, "in_proj_weight") else LINEAR
            yield Pair(name, layer, "", kind, part, parameter, b, layer.scaling, magnitude)


def _of_peft(name: str, layer: Any) -> Iterator[Pair]:
    """Yield the updates of a LoRA layer of PEFT, one for each of its adapters."""
    base = layer.get_base_layer()
    part = getattr(layer, "parameter_name", "")
    for adapter in layer.lora_embedding_A:
        yield Pair(
            name,
            layer,
            adapter,
            EMBEDDING,
            part,
            layer.lora_embedding_A[adapter],
            layer.lora_embedding_B[adapter],
            layer.scaling[adapter],
            _magnitude(layer, adapter),
        )
    for adapter in layer.lora_A:
        if part:
            kind = EXPERTS
        elif hasattr(base, "kernel_size"):
            kind = CONV
        else:
            kind = ATTENTION if hasattr(base, "in_proj_weight") else LINEAR
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        if hasattr(a, "weight"):  # AdaLoRA's and others' are no modules
            yield Pair(
                name, layer, adapter, kind, part, a.weight, b.weight, layer.scaling[adapter], _magnitude(layer, adapter)
            )


def _magnitude(layer: Any, adapter: str) -> nn.Parameter | None:
    vectors = layer.lora_magnitude_vector
    return vectors[adapter].weight if adapter in vectors else None
