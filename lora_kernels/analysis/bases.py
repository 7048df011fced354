"""`base_of`: where the frozen W of each update is found: in its own layer, in another model, or in files."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.analysis.updates import Update, Updates
from lora_kernels.analysis.weights import Weights, weights_of
from lora_kernels.models.names import plain_name, plain_names
from lora_kernels.models.pairs import CONV, EMBEDDING, EXPERTS
from lora_kernels.models.targets import some
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.fit import Conv1DLike
from lora_kernels.quant.bnb import from_bnb
from lora_kernels.quant.weight import DTYPES, QuantizedWeight

_STATE = ".quant_state.bitsandbytes__"
"""The part of a key that follows the name of a weight which bitsandbytes has stored in 4 bits."""


class Found(NamedTuple):
    """The weight of an update."""

    weight: Tensor | QuantizedWeight
    transposed: bool
    """Whether it is stored as Wᵀ."""


class Base:
    """A source of weights."""

    name: str
    """The name in reports."""

    def find(self, update: Update) -> Found | str:
        """Return the W of an update, or why there is none."""
        raise NotImplementedError


def base_of(base: nn.Module | str | os.PathLike[str] | None, updates: Updates) -> Base:
    """Return the source of weights: None is the model of the updates itself; a model; a directory or a file of
    safetensors; or the name of a model of the Hub that lies in the local cache. Nothing is downloaded.

    Raises FileNotFoundError where there is no such directory and nothing in the cache, and ValueError for a damaged
    file.
    """
    if base is None:
        return _OwnLayers()
    if isinstance(base, nn.Module):
        return _OfModel(base, updates)
    path = Path(base)
    return _OfFiles(weights_of(path if path.exists() else _cached(str(base))), updates)


class _OwnLayers(Base):
    name = "its own base"

    def find(self, update: Update) -> Found | str:
        assert update.pair is not None
        return _of_layer(update.pair.layer, update)


class _OfModel(Base):
    def __init__(self, model: nn.Module, updates: Updates) -> None:
        self.name = f"the {type(model).__name__}"
        self._modules = {name.replace(".base_layer", ""): module for name, _, module in plain_names(model)}
        self._names = _names_in(self._modules, updates)

    def find(self, update: Update) -> Found | str:
        name = self._names[update.layer]
        if name not in self._modules:
            return f"{self.name} has no {some([update.layer])}"
        return _of_layer(self._modules[name], update)


class _OfFiles(Base):
    def __init__(self, weights: Weights, updates: Updates) -> None:
        self.name = weights.name
        self._weights, self._transposed = weights, bool(updates.transposed)
        self._shapes = weights.shapes()
        self._of_bnb = {key.partition(_STATE)[0]: key for key in self._shapes if _STATE in key}
        self._modules = {key.removesuffix(".weight"): key for key in self._shapes if key.endswith(".weight")}
        self._modules |= {key.removesuffix(".in_proj_weight"): key for key in self._shapes if "in_proj_weight" in key}
        self._names = _names_in(self._modules, updates)

    def find(self, update: Update) -> Found | str:
        if update.kind == EXPERTS:
            return "the weights of experts lie in files in several forms: pass the model as the base"
        name = self._names[update.layer]
        if name not in self._modules:
            return f"{self.name} has no weight of {some([update.layer])}"
        key = self._modules[name]
        if key in self._of_bnb:
            return Found(from_bnb(self._four_bit(key)), False)
        weight = self._weights.tensor(key)
        if f"{name}.SCB" in self._shapes:
            weight.SCB = self._weights.tensor(f"{name}.SCB")  # type: ignore[attr-defined]
            return Found(from_bnb(weight), False)
        return _arranged(weight, update, update.kind == EMBEDDING or self._transposed)

    def _four_bit(self, key: str) -> Tensor:
        """Return the weight `key` of bitsandbytes with its state, as a Params4bit has it."""
        read = self._weights.tensor
        fields = json.loads(bytes(read(self._of_bnb[key]).tolist()))
        nested = f"{key}.nested_absmax" in self._shapes
        state = SimpleNamespace(
            shape=tuple(fields["shape"]), dtype=getattr(torch, fields["dtype"]), quant_type=fields["quant_type"],
            blocksize=fields["blocksize"], absmax=read(f"{key}.absmax"), code=read(f"{key}.quant_map"), nested=nested,
        )  # fmt: skip
        if nested:
            state.offset = torch.tensor(fields["nested_offset"])
            state.state2 = SimpleNamespace(
                absmax=read(f"{key}.nested_absmax"), code=read(f"{key}.nested_quant_map"),
                blocksize=fields["nested_blocksize"], dtype=getattr(torch, fields["nested_dtype"]),
            )  # fmt: skip
        weight = read(key)
        weight.quant_state = state  # type: ignore[attr-defined]
        return weight


def _names_in(names: Collection[str], updates: Updates) -> dict[str, str]:
    """Return the name that the base has, or would have, for each layer of the adapter.

    They are the same, or all of those of the adapter, or all of those of the base, have a prefix more, as those of a
    model have beside those of its inner one: "transformer.h.0.attn" and "h.0.attn". The prefix with which most layers
    are found is taken.
    """
    layers = list(dict.fromkeys(plain_name(update.layer, names) for update in updates.updates))
    more = {name.removesuffix(layer) for layer in layers for name in names if name.endswith(f".{layer}")}
    less = {layer.removesuffix(name) for layer in layers for name in names if name and layer.endswith(f".{name}")}
    ways = [("", ""), *((prefix, "") for prefix in sorted(more)), *(("", prefix) for prefix in sorted(less))]
    best = max(ways, key=lambda way: sum(_renamed(layer, *way) in names for layer in layers))
    return {update.layer: _renamed(plain_name(update.layer, names), *best) for update in updates.updates}


def _renamed(layer: str, more: str, less: str) -> str:
    """Return a name with the prefix `more`, and without the prefix `less`. One without that prefix has no counterpart,
    and becomes a name that nothing has."""
    return f"{more}{layer.removeprefix(less)}" if layer.startswith(less) else f"no {less}{layer}"


def _of_layer(module: Any, update: Update) -> Found | str:
    """Return the weight of a module, with an adapter or plain, or why it cannot be read."""
    layer = module
    if isinstance(module, AdapterLayer) and (frozen_weight := getattr(module, "frozen_weight", None)):
        return Found(frozen_weight(), False)
    if getattr(layer, "merged", False):
        return "its adapter is merged into its weight: unmerge it first"
    if hasattr(layer, "get_base_layer"):
        layer = layer.get_base_layer()
    if update.kind == EXPERTS:
        return _of_expert(layer, update)
    if update.layer.endswith(".out_proj") and hasattr(layer, "in_proj_weight"):  # one layer of ours has both updates
        layer = layer.out_proj
    weight = getattr(layer, "in_proj_weight", None)
    weight = getattr(layer, "weight", None) if weight is None else weight
    if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
        return Found(from_bnb(layer), False)
    if not isinstance(weight, Tensor):
        return f"a {type(layer).__name__} has no weight that could be read"
    if hasattr(weight, "placements"):
        return f"its weight is sharded, a {type(weight).__name__}: gather it first"
    return _arranged(weight, update, isinstance(layer, (Conv1DLike, nn.Embedding)) or update.kind == EMBEDDING)


def _of_expert(module: Any, update: Update) -> Found | str:
    stack = getattr(module, update.part, None)
    if not isinstance(stack, Tensor) or stack.dim() != 3 or len(stack) <= update.expert:
        return f"a {type(module).__name__} has no stack of matrices {update.part} with an expert {update.expert}"
    return _arranged(stack[update.expert], update, bool(getattr(module, "is_transposed", False)))


def _arranged(weight: Tensor, update: Update, transposed: bool) -> Found | str:
    """Return the weight as [N, K] or its transpose, as the shapes of A and B say, or by `transposed` where N = K."""
    N, K = update.b.shape[0], update.a.shape[1]
    if weight.is_meta:
        return "its weight is on the meta device, which holds no values (the model is offloaded, or not loaded yet)"
    if weight.dtype not in (torch.float64, *DTYPES):
        return f"its weight is {weight.dtype}, and of quantised ones those of bitsandbytes and this package are read"
    flat = weight.flatten(1) if update.kind == CONV or weight.dim() > 2 else weight
    if tuple(flat.shape) == (N, K) and not (transposed and N == K):
        return Found(flat, False)
    if tuple(flat.shape) == (K, N):
        return Found(flat, True)
    if update.kind == CONV and flat.shape[0] == N and K % flat.shape[1] == 0:
        return "its A sees all channels and W those of one group, so that ΔW is no update of W's size"
    return f"W {tuple(weight.shape)} does not go with an update of ({N}, {K}): it is of another base"


def _cached(name: str) -> Path:
    """Return the folder in which a model of the Hub lies on this machine. Raises FileNotFoundError."""
    why = f"there is no {name}, and no model of this name in the local cache of the Hub: pass its directory"
    if importlib.util.find_spec("huggingface_hub") is None or name.count("/") > 1:
        raise FileNotFoundError(why)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # a name that is none raises another type than one that is not there
        raise FileNotFoundError(why) from error


def missing_all(base: Base, reasons: dict[str, str]) -> str:
    """Return the error for a base that has the weight of no update."""
    first = next(iter(reasons.values()))
    return f"{base.name} has the weight of none of the adapter's layers, such as {some(list(reasons), 2)}: {first}"
