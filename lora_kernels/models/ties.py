"""Weights that several modules share, such as the table of an embedding and an output head: how they are found, adapted
together, and merged without a change of the other module."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels.models.names import bare, plain_names
from lora_kernels.models.targets import some
from lora_kernels.nn.adapter import AdapterLayer, is_adapter
from lora_kernels.nn.embedding import FusedLoRAEmbedding
from lora_kernels.nn.settings import LoRASettings
from lora_kernels.nn.tied import TiedLoRALinear


class Tied(NamedTuple):
    """The embedding of a model and the other layers that share its table."""

    embedding: nn.Module
    others: Sequence[nn.Module]
    """Output heads, and the embeddings of an encoder and a decoder."""


def tied_to_embedding(model: nn.Module) -> Tied | None:
    """Return the module that ``model.get_input_embeddings()`` returns, and the linear layers and embeddings that share
    its table. None where there are no such layers, or no such method."""
    embedding = _end(model, "get_input_embeddings")
    if embedding is None:
        return None
    table, kinds = embedding._parameters.get("weight"), (nn.Linear, nn.Embedding)
    sharing = [m for m in model.modules() if isinstance(m, kinds) and m._parameters.get("weight") is table]
    others = [module for module in sharing if module is not embedding]
    return Tied(embedding, others) if others and table is not None else None


def _end(model: nn.Module, method: str) -> nn.Module | None:
    """Return the module that a method of transformers models returns, such as the embedding; None where there is
    none."""
    get = getattr(bare(model), method, None)
    try:
        end = get() if callable(get) else None
    except NotImplementedError:  # by models without text
        return None
    return bare(end) if isinstance(end, nn.Module) else None


def with_adapter_of(source: AdapterLayer, module: Any, settings: LoRASettings) -> AdapterLayer:
    """Return a layer over the weight of `module`, a linear layer or an embedding, with the adapter of `source`, which
    is a `FusedLoRAEmbedding`. Raises ValueError or TypeError where that cannot be."""
    if isinstance(module, nn.Linear):
        return TiedLoRALinear.over(module, source, settings)
    layer = FusedLoRAEmbedding.from_settings(module, settings)
    for name, parameter in source.named_parameters(recurse=False):
        if is_adapter(name):
            setattr(layer, name, parameter)
    return layer


def are_tied(layers: Mapping[str, AdapterLayer]) -> bool:
    """Return whether some of the layers have the adapter of an embedding that is another of them."""
    tables = [id(b) for layer in layers.values() if (b := getattr(layer, "lora_embedding_B", None)) is not None]
    return len(set(tables)) < len(tables)


class Merged(NamedTuple):
    """What becomes of shared weights when a model is merged."""

    groups: list[list[str]]
    """The layers that have one adapter and get one weight."""
    parted: list[str]
    """The layers that get a weight of their own."""


def plan(model: nn.Module, layers: Mapping[str, AdapterLayer], untie: bool) -> Merged:
    """Return what becomes of the weights that layers share with other modules when they are merged.

    Raises ValueError where merging would part a table from the modules that share it, unless `untie` allows it: a
    transformers model would be saved and loaded with one of the two weights for both. Raises it also with `untie` for a
    model whose forward asks the config for the tie, as those of UMT5 and UDOP do.
    """
    ties = _ties_by_config(model)
    groups: list[list[str]] = []
    parted: dict[str, str] = {}
    for names in _sharing(model, layers):
        own = [name for name in names if name in layers]
        if own == names and len({_update(layers[name]) for name in own}) == 1:
            groups.append(own)
        elif ties or any(isinstance(layers[name], FusedLoRAEmbedding) for name in own):
            parted |= {name: some([other for other in names if other != name]) for name in own}
    shared = {name for names in groups for name in names} | parted.keys()
    for end in (_end(model, "get_input_embeddings"), _end(model, "get_output_embeddings")) if ties else ():
        # A quantised head has codes of its own.
        parted |= {name: "the other end" for name, layer in layers.items() if layer is end and name not in shared}
    if parted and not untie:
        told = "; ".join(f"{name} shares its weight with {others}" for name, others in parted.items())
        raise ValueError(
            f"{told}: merging would change one and not the other, and code that ties them again would lose one. "
            "merge_and_unload(model, untie=True) gives each a weight of its own, and sets tie_word_embeddings in the "
            "model's config to False. apply_lora(model, ensure_weight_tying=True) gives both one adapter from the "
            "start, with which they stay tied"
        )
    kind = type(bare(model))
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    if parted and "tie_word_embeddings" in getattr(code, "co_names", ()):
        raise ValueError(
            f"the forward of {kind.__name__} computes something else where tie_word_embeddings is False, so "
            f"{some(list(parted))} cannot get a weight of its own: apply_lora(model, ensure_weight_tying=True) gives "
            "both one adapter, with which they stay tied"
        )
    return Merged(groups, list(parted))


def _sharing(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> list[list[str]]:
    """Return the names of the modules that share a weight, for each weight that several have and one of `layers` is
    among them. A part of a layer counts as the layer."""
    inside = {id(part): name for name, layer in layers.items() for part in layer.modules()}
    owners: dict[int, dict[str, None]] = {}
    for name, _, module in plain_names(model):
        for p in _weights(module):
            owners.setdefault(id(p), {})[inside.get(id(module), name)] = None
    return [list(names) for names in owners.values() if len(names) > 1 and any(name in layers for name in names)]


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own weights; those of before for a merged layer, whose state_dict holds them."""
    own: dict[str, Any] = dict(module._parameters)
    if isinstance(module, AdapterLayer):
        module._save_to_state_dict(own, "", True)
    return [p for name, p in own.items() if isinstance(p, nn.Parameter) and p.ndim > 1 and not is_adapter(name)]


def _update(layer: Any) -> tuple[Any, ...]:
    """Return what the update of a layer is made of. Layers for which this is equal have the same merged weight, if they
    have the same weight."""
    if isinstance(layer, TiedLoRALinear):
        return id(layer.lora_B), id(layer.lora_embedding_B), layer.scaling, None
    if isinstance(layer, FusedLoRAEmbedding) and not layer.use_dora:
        a, pad = layer.lora_embedding_A, layer.padding_idx
        left_out = pad if pad is not None and bool(a.detach()[pad].any()) else None  # the row that A does not change
        return id(a), id(layer.lora_embedding_B), layer.scaling, left_out
    return (id(layer),)


def _ties_by_config(model: nn.Module) -> bool:
    """Return whether the config of a transformers model says that the head has the embedding's weight."""
    return any(getattr(config, "tie_word_embeddings", False) for config in _configs(model))


def untie_config(model: nn.Module) -> None:
    """Set tie_word_embeddings to False in the config of a transformers model, and take weights that are no longer
    shared out of its list of tied ones."""
    for config in _configs(model):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    for module in model.modules():
        keys: Any = module.__dict__.get("all_tied_weights_keys")
        for key, source in list(keys.items()) if isinstance(keys, dict) else ():
            with contextlib.suppress(AttributeError):  # a name of a parameter that is not there
                if module.get_parameter(key) is not module.get_parameter(source):
                    del keys[key]


def _configs(model: nn.Module) -> list[Any]:
    config = getattr(bare(model), "config", None)
    text = getattr(config, "get_text_config", None)
    return [config, text()] if callable(text) else [config]


@torch.no_grad()
def tie(model: nn.Module, names: Sequence[str]) -> None:
    """Give the modules with these plain names the weight of the first."""
    modules = {name: module for name, _, module in plain_names(model)}
    for name in names[1:]:
        modules[name].weight = modules[names[0]].weight
