"""Weights that several modules share, such as the table of an embedding and an output head: how they are found, adapted
together, and merged without a change of the other module."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels.models.names import bare, plain_names
from lora_kernels.models.targets import some
from lora_kernels.nn.adapter import AdapterLayer, is_adapter
from lora_kernels.nn.tied import TiedLoRALinear


class Tied(NamedTuple):
    """The embedding of a model and the heads that share its table."""

    embedding: nn.Module
    heads: Sequence[nn.Module]


def tied_heads(model: nn.Module) -> Tied | None:
    """Return the module that ``model.get_input_embeddings()`` returns and the linear layers whose weight is its table.
    None where there are no such layers, or no such method."""
    embedding = _end(model, "get_input_embeddings")
    if embedding is None:
        return None
    table = embedding._parameters.get("weight")
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m._parameters.get("weight") is table]
    return Tied(embedding, heads) if heads and table is not None else None


def _end(model: nn.Module, method: str) -> nn.Module | None:
    """Return the module that a method of transformers models returns, such as the embedding; None where there is
    none."""
    get = getattr(bare(model), method, None)
    try:
        end = get() if callable(get) else None
    except NotImplementedError:  # by models without text
        return None
    return bare(end) if isinstance(end, nn.Module) else None


class Shared(NamedTuple):
    """A layer whose base other modules share."""

    others: list[str]
    """The names of the others."""
    table: bool
    """Whether the layer is no linear one, but an embedding."""


def shared_bases(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> dict[str, Shared]:
    """Return the layers whose base weights other modules of the model share, also those that are merged."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, _, module in plain_names(model):
        for p in _weights(module):
            owners.setdefault(id(p), []).append((name, module))
    found = {}
    for name, layer in layers.items():
        inside = set(map(id, layer.modules()))
        others = [
            other or "the model"
            for module in layer.modules()
            for p in _weights(module)
            for other, owner in owners[id(p)]
            if id(owner) not in inside
        ]
        if others:
            found[name] = Shared(others, hasattr(layer, "num_embeddings"))
    return found


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own weights; those of before for a merged layer, whose state_dict holds them."""
    own: dict[str, Any] = dict(module._parameters)
    if isinstance(module, AdapterLayer):
        module._save_to_state_dict(own, "", True)
    return [p for name, p in own.items() if isinstance(p, nn.Parameter) and p.ndim > 1 and not is_adapter(name)]


class Merged(NamedTuple):
    """What becomes of shared weights when a model is merged."""

    pairs: list[tuple[str, str]]
    """The embeddings and heads with one adapter, which get one weight."""
    parted: list[str]
    """The layers that get a weight of their own."""


def plan(model: nn.Module, layers: Mapping[str, AdapterLayer], untie: bool) -> Merged:
    """Return what becomes of the weights that layers share with other modules when they are merged.

    Raises ValueError where merging would part a table from the modules that share it, unless `untie` allows it: a
    transformers model would be saved and loaded with one of the two weights for both.
    """
    ties, ends = ties_by_config(model), (_end(model, "get_input_embeddings"), _end(model, "get_output_embeddings"))
    shared = shared_bases(model, layers)
    pairs = []
    parted = {}
    for name, layer in layers.items():
        others = shared[name].others if name in shared else []
        partner = next((other for other in others if isinstance(layers.get(other), TiedLoRALinear)), None)
        if isinstance(layer, TiedLoRALinear):
            continue
        if partner is not None and _one_update(layer, layers[partner]) and set(others) == {partner}:
            pairs.append((name, partner))
        elif others and (shared[name].table or ties):
            parted[name] = some(others)
        elif ties and any(layer is end for end in ends):  # a quantised head has codes of its own
            parted[name] = "the other end of the model, by its config"
    if parted and not untie:
        told = "; ".join(f"{name} shares its weight with {others}" for name, others in parted.items())
        raise ValueError(
            f"{told}: merging would change one and not the other, and code that ties them again would lose one. "
            "merge_and_unload(model, untie=True) gives each a weight of its own, and sets tie_word_embeddings in the "
            "model's config to False. apply_lora(model, ensure_weight_tying=True) gives both one adapter from the "
            "start, with which they stay tied"
        )
    return Merged(pairs, list(parted))


def _one_update(embedding: Any, head: Any) -> bool:
    """Return whether an embedding and a head with its adapter have the same merged weight."""
    if head.lora_B is not embedding.lora_embedding_A or head.lora_embedding_B is not embedding.lora_embedding_B:
        return False
    pad = embedding.padding_idx  # the embedding leaves this row out, and the head does not
    return bool(head.scaling == embedding.scaling) and (pad is None or not bool(head.lora_B.detach()[pad].any()))


def ties_by_config(model: nn.Module) -> bool:
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
def tie(model: nn.Module, embedding: str, head: str) -> None:
    """Make the weight of the embedding that of the head."""
    modules = {name: module for name, _, module in plain_names(model)}
    modules[head].weight = modules[embedding].weight
