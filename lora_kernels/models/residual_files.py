"""ResLoRA with block shortcuts on disk, in PEFT's format: `save_reslora` and `load_reslora`.

The file holds the plain LoRA of rank Σr that each layer computes, so every reader of PEFT's format computes the same.
The first r rows of its A, and columns of its B, are the layer's own. With these the training goes on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.core import atomic
from lora_kernels.models.adapter_checks import check_names, refuse_empty, refuse_unsaved_parts
from lora_kernels.models.adapter_config import CONFIG, config_of, read_config
from lora_kernels.models.adapter_files import (
    PEFT_KEY,
    WEIGHTS,
    LayerAdapter,
    adapters_of,
    one_save,
    read_weights,
    safetensors_torch,
)
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import plain_names
from lora_kernels.models.reports import AdaptedLayer, ApplyReport
from lora_kernels.models.targets import some
from lora_kernels.nn.residual import ResLoRALinear
from lora_kernels.nn.settings import scaling_of


def save_reslora(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of a model with ResLoRA of structure "bs" to `directory` in PEFT's format, as plain LoRA of
    rank Σr, which computes the same.

    ``PeftModel.from_pretrained`` and `load_adapter` read it into a plain model, and `load_reslora` into one with the
    same shortcuts. A factor stands in the file once for each layer that computes with it: the file is Σr / r times as
    large as the adapters. It is written as `save_adapter` writes.

    Raises:
        ValueError: a model without ResLoRA, or with another structure than "bs"; adapters that are sharded, or have no
            values.
        OSError, ImportError: as `save_adapter`.
    """
    st = safetensors_torch()
    layers = _layers(model, "nothing was saved")
    plain = {}
    for name, layer in layers.items():
        try:
            plain[name] = layer.as_lora()
        except ValueError as error:
            raise ValueError(f"{name}: {error}; nothing was saved") from None
    refuse_empty(dict(plain))
    refuse_unsaved_parts(dict(plain))
    config = config_of(model, dict(plain))
    tensors = {
        f"base_model.model.{name}.{key}": layer.get_parameter(part.parameter).detach().cpu()
        for name, layer in plain.items()
        for key, part in layer.file_parts().items()
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    atomic.replace(
        {
            directory / WEIGHTS: st.save(tensors, metadata={"format": "pt"}),
            directory / CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
        }
    )


@torch.no_grad()
def load_reslora(model: nn.Module, directory: str | os.PathLike[str]) -> ApplyReport:
    """Load what `save_reslora` has written into a model with ResLoRA of structure "bs" and the same shortcuts, to go on
    with its training. lora_alpha and use_rslora become those of the file. Returns a report of the layers.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a model without ResLoRA, or with another structure; files that are broken, or not of a LoRA; an
            adapter of other layers, shapes or ranks; factors that layers share here and that have two values in the
            file, as those of a plain LoRA have; merged layers.
        TimeoutError, ImportError: as `load_adapter`.
        After any error the model is unchanged.
    """
    directory = Path(directory)
    layers = _layers(model, "nothing was loaded")
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(f"these layers are merged: {some(merged)}. unmerge() them first; nothing was loaded")
    refuse_empty(dict(layers))
    if not directory.is_dir():
        read_config(directory / CONFIG)  # which raises the error
    with one_save(directory):
        config, tensors = read_config(directory / CONFIG), read_weights(directory / WEIGHTS)
    names = {name: module for name, _, module in plain_names(model)}
    config = config.for_names(names, directory / CONFIG)
    stored = adapters_of(tensors, PEFT_KEY, config.settings.use_dora, str(directory / WEIGHTS), names)
    check_names(stored._replace(source=str(directory)), set(layers), model)
    adapters = stored.linear()
    own = _own_factors(layers, adapters, directory)
    for name, layer in layers.items():
        for parameter, value in zip((layer.lora_A, layer.lora_B), own[name], strict=True):
            parameter.copy_(value)
        rslora, ratio = config.settings.use_rslora, layer.r / layer.total_rank
        alpha = config.alpha(name) * (math.sqrt(ratio) if rslora else ratio)
        if rslora != layer.use_rslora or not math.isclose(alpha, layer.lora_alpha, rel_tol=1e-12):
            layer.use_rslora, layer.lora_alpha = rslora, alpha
        layer.scaling = scaling_of(layer.lora_alpha, layer.r, layer.use_rslora)
    return ApplyReport(tuple(AdaptedLayer.of(name, layer) for name, layer in layers.items()), {}, ())


def _layers(model: nn.Module, nothing: str) -> dict[str, ResLoRALinear]:
    """Return the layers of a model all of whose adapters are ResLoRA of structure "bs"."""
    layers: dict[str, Any] = dict(lora_layers(model))
    other = [
        f"{name} (structure={layer.structure!r})" if isinstance(layer, ResLoRALinear) else name
        for name, layer in layers.items()
        if not isinstance(layer, ResLoRALinear) or layer.structure != "bs"
    ]
    if other or not layers:
        raise ValueError(
            'this is for a model after apply_reslora(model, structure="bs")'
            + (f", and these layers are not so: {some(other)}" if other else "; it has no layer with an adapter")
            + '. Structures "is" and "ms" are saved by state_dict(), and by save_adapter after reslora_to_lora(model, '
            f"inputs); {nothing}"
        )
    return layers


def _own_factors(
    layers: Mapping[str, ResLoRALinear], adapters: Mapping[str, LayerAdapter], directory: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each layer's own A and B in the file. Raises ValueError where the file has another shape, or two values of
    one factor."""
    names = {id(layer): name for name, layer in layers.items()}
    own = {}
    for name, layer in layers.items():
        a, b = adapters[name]
        want = (layer.total_rank, layer.in_features), (layer.out_features, layer.total_rank)
        if (tuple(a.shape), tuple(b.shape)) != want:
            raise ValueError(
                f"{directory}: A {tuple(a.shape)} and B {tuple(b.shape)} of {name} should be {want[0]} and {want[1]} "
                "here: another base, rank or number of earlier blocks (previous). Nothing was loaded"
            )
        own[name] = a[: layer.r], b[:, : layer.r]
    for name, layer in layers.items():
        at = layer.r
        for other in reversed(layer.earlier):
            part = slice(at, at := at + other.r)
            a, b = own[names[id(other)]]
            if not (torch.equal(adapters[name].a[part], a) and torch.equal(adapters[name].b[:, part], b)):
                raise ValueError(
                    f"{directory}: the factors of {names[id(other)]} have two values, its own and those that {name} "
                    "computes with: the file is a plain LoRA that save_reslora has not written, or has other "
                    "shortcuts. Nothing was loaded; load_adapter reads it into a plain model"
                )
    return own
