"""The state_dict of a fused layer: the rank of an adapter that is loaded, and the stored tensors of a quantised W."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lora_kernels.nn.adapter import is_adapter
from lora_kernels.quant.weight import CODES, quantize_like

PARTS = ("weight", "weight_scales", "weight_table", "weight_absmax", "weight_offset")
"""The tensors of a quantised weight: a parameter and buffers. The last three exist only with double quantisation."""


_RANKS: Mapping[str, int] = MappingProxyType({"lora_A": 0, "lora_B": 1})


def check_rank(layer: Any, state_dict: dict[str, Any], prefix: str, ranks: Mapping[str, int] = _RANKS) -> None:
    """Raise ValueError where the adapter in `state_dict` has another rank than `layer`'s. `ranks` tells which dimension
    of a parameter is the rank, by its name."""
    for name, dim in ranks.items():
        key = prefix + name
        if key in state_dict and state_dict[key].shape[dim] != layer.r:
            rank = state_dict[key].shape[dim]
            raise ValueError(
                f"{key} {tuple(state_dict[key].shape)} is of rank {rank}, this module of r={layer.r}: "
                f"nothing was loaded into it. Build it with r={rank}"
            )


def put_adapter_beside(layer: Any, device: torch.device) -> None:
    """Give `layer` an adapter of the same shapes on `device`, with values still to be set."""
    with torch.inference_mode(False):  # what is made in inference mode could not be trained later
        for name, old in list(layer._parameters.items()):
            if old is not None and is_adapter(name):
                empty = torch.empty_like(old, device=device)
                setattr(layer, name, nn.Parameter(empty, requires_grad=old.requires_grad))


def signature(layer: Any) -> str:
    """Return the format of a `QuantizedLoRALinear`, as it stands in weight_format."""
    text = f"{layer.format} {layer.blocksize}" if layer.blocksize else layer.format
    return text + (" double_quant" if PARTS[2] in layer._buffers else "")


def refuse_sharded_codes(layer: Any) -> None:
    """Raise ValueError where this process holds only a part of the codes of a `QuantizedLoRALinear`."""
    if hasattr(layer.weight, "placements"):
        raise ValueError(
            f"the codes of this {type(layer).__name__} are sharded, and a dense weight cannot be quantised into "
            "them: load it before fully_shard, or load the state of a quantised model"
        )


def stored_state(layer: Any, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return `state_dict` with its weight in the format of `layer`, a `QuantizedLoRALinear`. Raises ValueError where
    anything in it does not fit the layer: torch itself would cast other dtypes, and would load the parts that fit
    without the rest."""
    key = prefix + "weight_format"
    weight, mine = state_dict.get(prefix + "weight"), layer.quantized_weight()
    names = PARTS[: len(mine.tensors)]
    nothing = "nothing was loaded into it"
    if key in state_dict:
        given = bytes(state_dict[key].tolist()).decode(errors="replace")
        if given != signature(layer):
            raise ValueError(
                f"{prefix}weight is in format {given!r}, this module's in {signature(layer)!r}: {nothing}. "
                "Build it with that format"
            )
        missing = [name for name in names if prefix + name not in state_dict]
        if missing:
            raise ValueError(f"{key} is there, but not {', '.join(missing)}: {nothing}")
        # With assign=True these become the stored tensors, and kernels read them as contiguous.
        state_dict = state_dict | {prefix + name: state_dict[prefix + name].contiguous() for name in names}
        codes = state_dict[prefix + "weight"]
        if codes.dtype == CODES[layer.format]:  # as earlier versions stored them
            state_dict[prefix + "weight"] = codes.view(torch.int8)
    elif weight is not None and weight.is_floating_point() and weight.shape == mine.shape:
        here = layer.weight.device
        refuse_sharded_codes(layer)
        with torch.inference_mode(False):
            q = quantize_like(weight if here.type == "meta" else weight.to(here), mine)
        parts = (q.codes.view(torch.int8), *q.tensors[1:])
        state_dict = state_dict | {prefix + name: part for name, part in zip(names, parts, strict=True)}
    elif weight is not None or any(prefix + name in state_dict for name in names):
        got = "nothing" if weight is None else f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(
            f"{prefix}weight must be dense, {mine.shape}, or come in parts with weight_format as state_dict gives "
            f"them; got {got}: {nothing}"
        )
    stored = dict(zip(names, mine.tensors, strict=True))
    for name, own in (stored | dict(layer.named_parameters(recurse=False))).items():
        other = state_dict.get(prefix + name, own)
        if other.shape != own.shape:
            raise ValueError(f"{prefix}{name} is {tuple(other.shape)}, here {tuple(own.shape)}: {nothing}")
        if name in stored and other.dtype != own.dtype:
            raise ValueError(f"{prefix}{name} is {other.dtype}, here {own.dtype}: {nothing}")
    return state_dict
