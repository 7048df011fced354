"""`load_diffusers` reads the adapter files of diffusers, and of the trainers that write the same names."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_kernels.models.adapter_config import AdapterConfig, checked_config
from lora_kernels.models.adapter_files import (
    MAGNITUDE,
    Parts,
    StoredAdapters,
    check_values,
    read_metadata,
    read_weights,
)
from lora_kernels.models.foreign import Foreign, fitted, put_foreign
from lora_kernels.models.names import plain_name, plain_names
from lora_kernels.models.reports import ApplyReport
from lora_kernels.models.targets import some

METADATA = "lora_adapter_metadata"
"""The key of a safetensors file's notes under which diffusers writes the LoraConfig, as JSON."""

_A, _B = "lora_A.weight", "lora_B.weight"
_ENDINGS = {
    r"\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down)\.weight": _A,
    r"\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up)\.weight": _B,
    rf"\.{MAGNITUDE}(?:\.weight)?": MAGNITUDE,
    r"\.alpha": "alpha",
}
"""The endings of keys, and the parts that they are."""
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
"""The keys of the first diffusers with LoRA, whose adapters were in the processors of attention layers."""


def load_diffusers(
    model: nn.Module, state: Mapping[str, Tensor] | str | os.PathLike[str], *, prefix: str | None = None
) -> ApplyReport:
    """Load an adapter that diffusers has saved (``pytorch_lora_weights.safetensors``) into `model`, one part of a
    pipeline, such as ``pipeline.transformer``.

    The keys are ``<prefix>.<name>.lora_A.weight`` and ``.lora_B.weight``, or in older files and those of other trainers
    ``lora_down`` and ``lora_up``, ``lora.down`` and ``lora.up``, ``lora_linear_layer.down`` and ``.up``. A number
    ``<prefix>.<name>.alpha``, or else lora_alpha in the LoraConfig that diffusers writes into the file, gives s.
    Without either s = 1, as in diffusers. `save_adapter` then writes the model's adapters in PEFT's format.

    Args:
        model: a model with adapters exactly where the file has them, with its ranks; or a plain model, which gets such
            layers, as by `apply_lora`, with everything else frozen.
        state: the dictionary, or a safetensors file. A pickle is not opened here. What a pipeline's ``lora_state_dict``
            returns for the files of yet other tools is such a dictionary: ``{**state, **(alphas or {})}``.
        prefix: which part of the pipeline `model` is: "unet", "transformer", "text_encoder", ... The layers of other
            parts are left out, and the report's `passed_over` tells them. None takes a file of one part.

    Returns and raises as `load_adapter`.
    """
    if isinstance(state, Mapping):
        tensors, source, notes = dict(state), "the state dict", {}
    else:
        path = Path(state)
        tensors, source, notes = read_weights(path), str(state), read_metadata(path)
    names = {name: module for name, _, module in plain_names(model) if name}
    found, left_out, prefix = _of_prefix(_by_layer(tensors, source), names, prefix, source)
    config = _config(notes.get(METADATA), prefix, names, source)
    layers, alphas = {}, {}
    for name, parts in found.items():
        alphas[name] = _alpha(parts.pop("alpha", None), parts[_A].shape[0], name, config, source)
        layers[name] = _parts(parts, names[name], name, source)
    dora = [name for name, parts in layers.items() if MAGNITUDE in parts]
    if dora and len(dora) < len(layers):
        raise ValueError(f"{source} has DoRA for some layers only ({some(dora)}); nothing was loaded")
    if config is not None and config.settings.use_dora != bool(dora):
        has = "has magnitudes" if dora else "lacks the magnitudes"
        raise ValueError(f"{source} {has} of DoRA, and use_dora in its {METADATA} is {not dora}; nothing was loaded")
    ranks = {name: int(parts[_A].shape[0]) for name, parts in layers.items()}
    dropout = 0.0 if config is None else config.settings.lora_dropout
    foreign = Foreign(StoredAdapters(source, layers), ranks, alphas, dora=bool(dora), dropout=dropout)
    report = put_foreign(model, foreign)
    report.passed_over.update(dict.fromkeys(left_out, f"its prefix is not {prefix!r}"))
    return report


def is_of_diffusers(keys: Mapping[str, Any]) -> bool:
    """Return whether every key of a file is one that `load_diffusers` knows."""
    return all(_divided(key) is not None for key in keys)


def _divided(key: str) -> tuple[str, str] | None:
    """Return the layer of a key and which part of its adapter it is; None for a key that is not known."""
    if match := _PROCESSOR.search(key):
        which = "to_out.0" if match[1] == "out" else f"to_{match[1]}"
        return f"{key[: match.start()]}.{which}", _A if match[2] == "down" else _B
    for ending, part in _ENDINGS.items():
        if match := re.search(ending + "$", key):
            return key[: match.start()], part
    return None


def _by_layer(tensors: Mapping[str, Tensor], source: str) -> dict[str, Parts]:
    """Return the tensors of each layer by its name in the file. Raises ValueError for keys that are not known, and for
    layers that lack a part."""
    found: dict[str, Parts] = {}
    surplus = []
    for key, tensor in sorted(tensors.items()):
        if (divided := _divided(key)) is None:
            surplus.append(key)
            continue
        name, part = divided
        if part in found.setdefault(name, {}):
            raise ValueError(f"{source} has two values for {name}.{part}; nothing was loaded")
        found[name][part] = tensor
    if surplus:
        raise ValueError(f"{source} has keys that are no adapter of diffusers: {some(surplus)}; nothing was loaded")
    lacking = [f"{name}.{part}" for name, parts in found.items() for part in (_A, _B) if part not in parts]
    if lacking:
        raise ValueError(f"{source} lacks {some(lacking)}; nothing was loaded")
    if not found:
        raise ValueError(f"{source} holds no adapter")
    return found


def _of_prefix(
    found: dict[str, Parts], names: Mapping[str, nn.Module], prefix: str | None, source: str
) -> tuple[dict[str, Parts], list[str], str]:
    """Return the layers of this model by their names in it, the layers of other parts of the pipeline, and the prefix.

    Raises ValueError where the file has several prefixes and none was given, and where the model lacks a layer.
    """
    if prefix is None:
        if all(plain_name(name, names) in names for name in found):
            prefix = ""
        else:
            first = {name.partition(".")[0] for name in found}
            if len(first) > 1:
                raise ValueError(
                    f"{source} has adapters for several models, {some(sorted(first))}: say which is this one's, with "
                    "prefix=. Nothing was loaded"
                )
            prefix = first.pop()
    start = f"{prefix.rstrip('.')}." if prefix else ""
    own = {name.removeprefix(start): parts for name, parts in found.items() if name.startswith(start)}
    if not own:
        raise ValueError(f"{source} has no adapter whose name begins with {start!r}. Nothing was loaded")
    real = {plain_name(name, names): parts for name, parts in own.items()}
    if absent := [name for name in real if name not in names]:
        raise ValueError(
            f"{source}: the model has no place for {some(absent)}. Is another prefix= this model's? If these are the "
            "names of another tool, lora_state_dict of the pipeline's class in diffusers converts the file, and "
            "load_diffusers takes what it returns. Nothing was loaded"
        )
    return real, [name for name in found if not name.startswith(start)], prefix


def _config(text: str | None, prefix: str, names: Mapping[str, nn.Module], source: str) -> AdapterConfig | None:
    """Return the LoraConfig in the notes of a file, or None where it has none."""
    if text is None:
        return None
    where = f"{METADATA} of {source}"
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); nothing was loaded") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is no object of JSON; nothing was loaded")
    start = f"{prefix}." if prefix else ""
    if start and any(key.startswith(start) for key in fields):
        fields = {key.removeprefix(start): value for key, value in fields.items() if key.startswith(start)}
    if fields.get("peft_type") is None:
        fields["peft_type"] = "LORA"
    return checked_config(fields, where).for_names(names, where)


def _alpha(stored: Tensor | None, rank: int, name: str, config: AdapterConfig | None, source: str) -> float:
    """Return the lora_alpha with which alpha/r is the s of a layer."""
    if stored is not None:
        if stored.numel() != 1 or not math.isfinite(float(stored)):
            raise ValueError(
                f"{source}: alpha of {name} is {stored.tolist()!r:.100}, not one finite number; nothing was loaded"
            )
        return float(stored)
    if config is None:
        return float(rank)
    alpha = config.alpha(name)
    return alpha * math.sqrt(rank) if config.settings.use_rslora else alpha  # s = alpha/√r there


def _parts(parts: Parts, module: Any, name: str, source: str) -> Parts:
    """Return A and B in PEFT's layout for `module`. Raises ValueError for tensors that are not those of an adapter."""
    a, b = fitted(parts[_A], parts[_B], module)
    converted = {**parts, _A: a, _B: b}
    check_values(converted, name, source)
    return converted
