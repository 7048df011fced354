"""What a checkpoint has to hold beside PEFT's adapter file after a restart: the base weights, and copies in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_kernels.core import atomic
from lora_kernels.models.adapter_files import read_weights, safetensors_torch
from lora_kernels.models.names import bare
from lora_kernels.models.pairs import pairs
from lora_kernels.models.targets import some
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.train import restartable, sharded

NAME = "relora.safetensors"
"""The file in the folder of a checkpoint."""
_MODEL, _MASTER = "model.", "master."


def needed(model: nn.Module, master: Mapping[str, Tensor] | None) -> bool:
    """Return whether a checkpoint of transformers' Trainer lacks something: it holds the adapters of PEFT alone, but
    whole models otherwise."""
    return master is not None or has_peft(model)


def has_peft(model: nn.Module) -> bool:
    """Return whether the model has adapters of PEFT."""
    return any(not isinstance(pair.layer, AdapterLayer) for pair in pairs(model))


def save(model: nn.Module, master: Mapping[str, Tensor] | None, folder: Path, write: bool) -> None:
    """Write the trained parameters and the base weights of the adapters, and `master`, into `folder`. In several
    processes all make this call, and those with `write` write."""
    tensors = {_MODEL + name: sharded.whole(p) for name, p in _parameters(model).items()}
    tensors |= {_MASTER + name: copy for name, copy in (master or {}).items()}
    if write:
        held = {name: t.to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        atomic.replace({folder / NAME: safetensors_torch().save(held, metadata={"format": "pt"})})


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Read into `model` what `save` has written, and return the copies in fp32.

    Raises FileNotFoundError, or ValueError where the file is not of this model, or its adapters are not those that the
    model has: it is of another checkpoint. Nothing is changed then.
    """
    path = folder / NAME
    tensors = read_weights(path)
    own = _parameters(model)
    stored = {name.removeprefix(_MODEL): t for name, t in tensors.items() if name.startswith(_MODEL)}
    odd = [n for n in own.keys() | stored.keys() if n not in own or n not in stored or own[n].shape != stored[n].shape]
    if odd:
        raise ValueError(f"{path} is of another model: {some(sorted(odd))} differ. Nothing was loaded")
    adapters = [name for name in own if ".lora_" in name]
    others = [name for name in adapters if not torch.equal(sharded.whole(own[name]).cpu(), stored[name])]
    if others:
        raise ValueError(
            f"{path} is of another checkpoint than the adapters that were loaded: {some(others)} differ. Nothing was "
            "loaded"
        )
    for name, p in own.items():
        sharded.write(p, stored[name].to(p.dtype))
    return {name.removeprefix(_MASTER): t for name, t in tensors.items() if name.startswith(_MASTER)}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a model and the base weights of its adapters, by their names without wrappers
    around the model."""
    bases = {id(update.weight) for update in restartable.updates_of(model)[0]}
    return {name: p for name, p in bare(model).named_parameters() if p.requires_grad or id(p) in bases}
