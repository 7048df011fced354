"""Adapters on disk in PEFT's format: `save_adapter` and `load_adapter`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.core import atomic
from lora_kernels.models import foreign_files, inject, shared_config, shared_files
from lora_kernels.models.adapter_checks import refuse_unsaved_parts, values_of
from lora_kernels.models.adapter_config import (
    CONFIG,
    AdapterConfig,
    checked_config,
    config_of,
    read_config,
    read_fields,
)
from lora_kernels.models.adapter_files import (
    PEFT_KEY,
    WEIGHTS,
    Parts,
    StoredAdapters,
    adapters_of,
    one_save,
    pairs,
    read_weights,
    safetensors_torch,
    shown,
)
from lora_kernels.models.adapter_values import apply_stored, fill_stored
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import plain_name, plain_names
from lora_kernels.models.reports import ApplyReport
from lora_kernels.models.selection import select
from lora_kernels.models.shared import shared_layers
from lora_kernels.models.targets import Rules, parameters_of, some, told_by_reason
from lora_kernels.nn.adapter import AdapterLayer, is_adapter
from lora_kernels.nn.attention import FusedLoRAMultiheadAttention
from lora_kernels.nn.conv1d import FusedLoRAConv1D


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write every adapter in `model` to `directory` in PEFT's format, which ``PeftModel.from_pretrained`` and
    `load_adapter` read.

    A and B are written in their own dtype under ``base_model.model.<name>.lora_A.weight`` and ``.lora_B.weight``,
    DoRA's m under ``.lora_magnitude_vector``; other kinds of layers have the keys that PEFT gives them. Values of r and
    lora_alpha that differ between layers go to rank_pattern and alpha_pattern. lora_alpha is written and `scaling` is
    not, so that a layer which is switched off by ``scaling = 0`` is saved whole. A merged layer's adapter is saved too,
    and so is that of a model that accelerate has offloaded. Trained parameters outside the adapters are not saved: a
    warning names them.

    Layers that share A and B have PEFT's format of VeRA, which has these once, or not at all with
    ``save_projection=False``. PEFT knows no Tied-LoRA: where A or B is trained, or s is not 1, the same keys begin with
    ``tied_`` and the config's peft_type is "TIED_LORA", which `load_adapter` alone reads.

    The names in the file are those of the model without wrappers (torch.compile, activation checkpointing, DDP, FSDP,
    ...) around it or around parts of it. Tied adapters are written for each layer: a warning says that the tie is not
    saved, unless it is that of ``ensure_weight_tying``. A warning names the layers that PEFT computes in another way
    from the same file, such as convolutions with a dilation, and lora_dropout beside experts, which PEFT refuses.

    Both files are written in full, and flushed to the disk, in a temporary folder inside `directory`. Then renames put
    them in the place of the old ones, the weights first and the config last. An error on the way leaves the old files
    as they were. Several threads and processes may save at once: each reader of one file sees a whole one, and
    `load_adapter`, which takes the directory's lock, sees two files of one save. What a killed save has left is removed
    by the next one; if it was killed between the two renames, the next `save_adapter` or `load_adapter` makes the
    second. A symbolic link in the place of a file is replaced, and the file that it names is kept.

    Raises:
        ValueError: the model has no layer with an adapter; it is one itself, and so has no name to save under; PEFT's
            format has no place for one of its adapters (a convolution with ``grouped=True``); its adapters have further
            parameters, or sharded or flattened ones, or ones without values (on the meta device), or a lora_alpha or
            lora_dropout that is no finite number; or they differ in use_rslora or use_dora, of which the format has one
            for all.
        OSError: the files cannot be written: no permission, no space, or another process that has held the directory's
            lock for a minute.
        ImportError: safetensors is not installed.
    """
    st = safetensors_torch()
    layers = lora_layers(model)
    if not layers or "" in layers:
        what = "is such a layer itself: put it in a module, for a name" if layers else "has no layer with an adapter"
        raise ValueError(f"the model {what}; nothing was saved")
    contents = shared_files.contents if shared_layers(model) else _contents
    config, values = contents(model, layers)
    _warn_of_what_is_not_saved(model, layers)
    _warn_of_peft(layers, "the adapters of these layers compute something else in PEFT")
    tensors = {key: value.to("cpu", copy=True).contiguous() for key, value in values.items()}  # tied ones part
    weights = st.save(tensors, metadata={"format": "pt"})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    atomic.replace(
        {
            directory / WEIGHTS: weights,
            directory / CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
        }
    )


def _contents(model: nn.Module, layers: dict[str, AdapterLayer]) -> tuple[dict[str, Any], Parts]:
    """Return the config and the tensors of a file of LoRA. Raises what `save_adapter` raises."""
    refuse_unsaved_parts(layers)
    values = {
        f"base_model.model.{name}.{part}": value
        for name, adapter in values_of(model).items()
        for part, value in adapter.items()
    }
    return config_of(model, layers), values


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], *, prefix: str | None = None) -> ApplyReport:
    """Load an adapter in PEFT's format, made by PEFT or by `save_adapter`, from `directory` into `model`.

    A safetensors file, or a directory without adapter_config.json that has one, is an adapter of another tool: that of
    diffusers (`load_diffusers`), or of kohya's sd-scripts or LyCORIS (`load_lycoris`), with their `prefix`.

    A model with adapters must have them exactly where the file has some, with the same ranks, and with use_dora if the
    file holds DoRA adapters. A, B and m are written into its parameters, rounded to their dtype. lora_alpha, use_rslora
    and scaling become those of the config; lora_dropout and the choice of what is trained stay the model's.

    A directory of VeRA, or of Tied-LoRA from `save_adapter`, gives u, v, A and B. Where a file of VeRA has no A and B,
    they are drawn from its projection_prng_key.

    PEFT writes the weights of an adapted embedding and of the head beside the adapter. They must equal the model's.

    A plain model gets LoRA first, as by `apply_lora` with the config's settings: the adapters train and everything else
    is frozen. A, B and m are in fp32 beside fp16 and bf16 weights, as in PEFT, and else have the weight's dtype.

    Names are those without wrappers (torch.compile, activation checkpointing, DDP, FSDP, ...), in the model and in the
    file. So a file that was saved from a wrapped model goes into a plain one, and the reverse.

    The config's regular expressions are Python's. Those with repetitions or groups are first tried with the model's
    names in a process of their own, and refused if they take more than a second of processor time.

    Whether the model is in training mode stays as it is. Whether its weights are those that the adapter was trained
    with cannot be checked: the files tell the base's names and shapes only.

    Returns:
        An `ApplyReport` of the layers that were loaded.

    Raises:
        FileNotFoundError: one of the two files is missing (``adapter_model.bin``, a pickle, is not read).
        ValueError: a file that is cut short or is not what its name says; keys that are missing or that the model has
            no place for; other shapes or ranks; DoRA into layers without it, or the reverse; a config with something
            that is not computed here (lora_bias, modules_to_save, an initialisation that changes the
            base, ...), or with a field that is not known here and not off; a regular expression that takes too long; a
            merged layer, a sharded one, or one on the meta device, as in an offloaded model; two values for tied
            parameters; weights of the base that are not the model's.
        TimeoutError: a save has held the directory's lock for a minute.
        ImportError: safetensors is not installed.
        After any error, also one that is not listed here, the model is unchanged.
    """
    directory = Path(directory)
    if (other := foreign_files.foreign_file(directory)) is not None:
        return foreign_files.load_foreign(model, other, prefix)
    if prefix is not None:
        raise ValueError(f"prefix={prefix!r} is for files of diffusers, kohya or LyCORIS, and {directory} is PEFT's")
    if directory.name == WEIGHTS and directory.is_file():
        directory = directory.parent
    config, tensors = _read(directory)
    if isinstance(config, shared_config.SharedConfig):
        return shared_files.load(model, directory, config, tensors)
    names = {name: module for name, _, module in plain_names(model)}
    config = config.for_names(names, directory / CONFIG)
    tensors = _without_equal_bases(tensors, names)
    stored = adapters_of(tensors, PEFT_KEY, config.settings.use_dora, str(directory / WEIGHTS), names)
    stored = stored._replace(source=str(directory))
    _check_ranks(stored, config, names)
    if lora_layers(model):
        rules = config.rules
        alphas = {n: config.alpha(_pattern_name(n, names[n], rules)) for n in stored.layers if n in names}
        report = fill_stored(model, stored, alphas, config.settings.use_rslora)
    else:
        try:
            selection = select(model, config.settings, config.rules)
        except ValueError as error:
            raise ValueError(
                f"{directory} is an adapter of another base, or of layers not supported here: {error}"
            ) from None
        report = apply_stored(model, selection, stored)
    if config.of_peft:
        _warn_of_peft(lora_layers(model), f"PEFT has trained {directory} with another function than ours")
    return report


def _check_ranks(stored: StoredAdapters, config: AdapterConfig, names: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where an adapter has another rank than the config says. Those of experts, which have one after
    the other in one tensor, have a multiple of it."""
    for name, parts in stored.layers.items():
        for first, _ in pairs(parts) if name in names else ():
            key = _pattern_name(name, names[name], config.rules)
            size, rank = parts[first].shape[0], config.rank(key)
            if size != rank and not (key != name and size % rank == 0):
                raise ValueError(
                    f"{stored.source}: {name}.{shown(first)} is {tuple(parts[first].shape)}, but r (or rank_pattern) "
                    f"in {CONFIG} is {rank}: the two files are not of one adapter. Nothing was loaded"
                )


def _pattern_name(name: str, module: nn.Module, rules: Rules) -> str:
    """Return the name by which rank_pattern and alpha_pattern choose for a module: its own, or that of its first
    parameter which target_parameters name."""
    parameters = parameters_of(module, frozenset(rules.target_parameters or ()), name)
    return f"{name}.{parameters[0]}" if parameters else name


def _warn_of_peft(layers: Mapping[str, AdapterLayer], what: str) -> None:
    """Warn of the layers whose adapters PEFT computes in another way."""
    reasons = {name: reason for name, layer in layers.items() if (reason := layer.why_not_file())}
    if any(isinstance(layer, FusedLoRAConv1D) for layer in layers.values()):
        why = "beside a Conv1D, for which it sets fan_in_fan_out, PEFT transposes the update of an attention's out_proj"
        reasons |= {name: why for name, layer in layers.items() if isinstance(layer, FusedLoRAMultiheadAttention)}
    if reasons:
        warnings.warn(f"{what}: {told_by_reason(reasons)}", stacklevel=3)


def _without_equal_bases(tensors: Parts, names: Mapping[str, nn.Module]) -> Parts:
    """Return the tensors of a file without those of the base that are equal to the model's. PEFT adds them where an
    embedding is adapted."""
    kept: Parts = {}
    for key, value in tensors.items():
        inside = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        name, _, parameter = inside.rpartition(".")
        named = parameter in ("weight", "bias")
        own: Any = getattr(names.get(plain_name(name, names)), parameter, None) if named else None
        same = isinstance(own, Tensor) and not own.is_meta and own.shape == value.shape
        if not (same and torch.equal(own.detach().cpu(), value.to(own.dtype))):
            kept[key] = value
    return kept


def _warn_of_what_is_not_saved(model: nn.Module, layers: dict[str, AdapterLayer]) -> None:
    """Warn of what a reader of the files cannot know."""
    rate = max(layer.lora_dropout for layer in layers.values())
    if rate and any(layer.target_parameters for layer in layers.values()):
        warnings.warn(
            f"lora_dropout={rate:g} is not saved, since PEFT refuses it beside target_parameters", stacklevel=3
        )
    own = {id(parameter) for parameter in inject.adapter_parameters(model)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        warnings.warn(f"these trained parameters are in no adapter and were not saved: {some(others)}", stacklevel=3)
    # The config tells that layers have the adapter of an embedding.
    told = {id(p) for layer in layers.values() for key, p in layer.named_parameters() if "lora_embedding_" in key}
    first: dict[int, str] = {}
    tied = []
    for name, layer in layers.items():
        for key, p in layer.named_parameters():
            if is_adapter(key) and id(p) not in told and first.setdefault(id(p), f"{name}.{key}") != f"{name}.{key}":
                tied.append(f"{name}.{key} (to {first[id(p)]})")
    if tied:
        warnings.warn(
            f"these adapters are tied: {some(tied)}. Each is saved with its values, but the files do not tell the tie: "
            "tie them again in a new model before it trains",
            stacklevel=3,
        )
    places: dict[int, set[tuple[int, str]]] = {id(layer): set() for layer in layers.values()}
    for module in model.modules():
        for child, inner in module._modules.items():
            if id(inner) in places:
                places[id(inner)].add((id(module), child))
    several = [name for name, layer in layers.items() if len(places[id(layer)]) > 1]
    if several:
        warnings.warn(
            f"these layers stand at several places of the model: {some(several)}. load_adapter adapts each place, but "
            "PEFT the first one only",
            stacklevel=3,
        )


def _read(directory: Path) -> tuple[AdapterConfig | shared_config.SharedConfig, Parts]:
    """Return what the two files of an adapter hold, which no `save_adapter` replaces in the meantime."""
    if not directory.is_dir():
        return read_config(directory / CONFIG), {}  # which raises the error
    with one_save(directory):
        fields = read_fields(directory / CONFIG)
        kind = fields.get("peft_type") if isinstance(fields, dict) else None
        shared = isinstance(kind, str) and kind in shared_config.FORMATS
        config = (shared_config.checked if shared else checked_config)(fields, directory / CONFIG)
        return config, read_weights(directory / WEIGHTS)
