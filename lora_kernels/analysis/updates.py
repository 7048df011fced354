"""`updates_of`: every low-rank update of an adapter as A [r, K] and B [N, r], from a live model or from files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_kernels.analysis.stored import read_stored
from lora_kernels.models.adapter_config import CONFIG
from lora_kernels.models.adapter_files import (
    LORALIB_KEY,
    MAGNITUDE,
    PEFT_KEY,
    WEIGHTS,
    Parts,
    adapters_of,
    read_weights,
)
from lora_kernels.models.adapter_files import pairs as part_pairs
from lora_kernels.models.pairs import ATTENTION, CONV, EMBEDDING, EXPERTS, LINEAR, Pair, pairs, told_others
from lora_kernels.models.targets import matches, some
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.attention import OUT_PROJ_COUNTED
from lora_kernels.nn.residual import ResLoRALinear
from lora_kernels.nn.settings import scaling_of
from lora_kernels.ops.embedding_passes import without_row

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""A model with adapters, a state dict, the directory of an adapter, or a file of loralib."""

_RESTARTED = ("restarted", "relora")
"""What a restart writes into layers of this package, and into PEFT's configs."""
_CHANGES_BASE = ("pissa", "olora", "loftq", "lq_lora", "corda", "lora_ga", "milora", *_RESTARTED)


@dataclass(frozen=True, eq=False)
class Update:
    """One update ΔW = s·B A."""

    name: str
    """The plain name of the layer, with the part and the number of the expert where it has several updates, such as
    "model.layers.0.mlp.experts.down_proj[3]"."""
    kind: str
    """The kind of the layer, one of those of `lora_kernels.models.pairs`."""
    a: Tensor
    """A [r, K]. K of an embedding is its number of tokens, and that of a convolution channels times kernel."""
    b: Tensor
    """B [N, r]."""
    scale: float
    """s."""
    dora: bool = False
    """Whether the layer scales the rows of W + ΔW to learned norms."""
    pair: Pair | None = None
    """Where it comes from in a live model."""
    layer: str = ""
    """The name of the layer alone."""
    part: str = ""
    """Which of the updates of the layer it is."""
    expert: int = -1
    """The number of the expert; -1 where there are none."""


@dataclass(frozen=True)
class Updates:
    """The updates of an adapter."""

    source: str
    """The name in reports and errors."""
    updates: list[Update]
    notes: tuple[str, ...] = ()
    """Remarks about this adapter for the reader of its numbers."""
    transposed: bool | None = None
    """Whether the config says that linear weights are stored as Wᵀ; None where there is none."""
    names: dict[str, Update] = field(init=False)
    """The updates by name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", {update.name: update for update in self.updates})


def updates_of(source: Source, name: str | None = None, lora_alpha: float | None = None) -> Updates:
    """Return the updates of a model with adapters, of a directory that PEFT or `save_adapter` has written, or of a
    state dict or safetensors file with loralib's or PEFT's keys, whose scale needs `lora_alpha`. `name` chooses one of
    several adapters of a model of PEFT.

    Raises ValueError, KeyError and FileNotFoundError, which name what is wrong.
    """
    if isinstance(source, nn.Module):
        return _of_model(source, name)
    if name is not None:
        raise ValueError(f"an adapter's name ({name!r}) is for models: files hold one adapter")
    if isinstance(source, Mapping):
        return _of_state(source, "the state dict", lora_alpha)
    path = Path(source)
    if path.is_dir():
        if lora_alpha is not None:
            raise ValueError(f"lora_alpha={lora_alpha} is for files without a config, and {path / CONFIG} has it")
        return _of_directory(path)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{path} is a pickle and is not opened here: pass torch.load(path, weights_only=True)")
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file() and lora_alpha is None:
        return _of_directory(path.parent)
    return _of_state(read_weights(path), str(path), lora_alpha)


def _of_model(model: nn.Module, name: str | None) -> Updates:
    source, found = f"the {type(model).__name__}", pairs(model, name)
    adapters = list(dict.fromkeys(pair.adapter for pair in found))
    if not found:
        others = told_others(model)
        raise ValueError(f"{source} has no update s·B A: apply_lora or load_adapter gives it some{others}")
    if len(adapters) > 1:
        raise ValueError(f"{source} has several adapters: choose one of {some(adapters)} by its name")
    label = f"{source}, adapter {adapters[0]!r}" if adapters[0] else source
    started = {getattr(pair.layer, "init", "") for pair in found} | {
        config.init_lora_weights
        for module in model.modules()
        if isinstance(configs := getattr(module, "peft_config", None), dict)
        for key, config in configs.items()
        if key in adapters and hasattr(config, "init_lora_weights")
    }
    texts = sorted(init for init in started if isinstance(init, str) and _took_part(init))
    notes = [_started(label, init) for init in texts]
    if any(getattr(pair.layer, "structure", "bs") != "bs" for pair in found):
        notes.append(
            f"the layers of {label} read activations of earlier blocks too (ResLoRA): the numbers are those of each "
            "layer's own s·B A, without these shortcuts"
        )
    return Updates(label, [update for pair in found for update in _of_pair(pair)], tuple(notes))


def _of_pair(pair: Pair) -> Iterator[Update]:
    """Yield the updates of a pair: one, or one for each expert."""
    layer, part = pair.name.removeprefix("base_model.model.").replace(".base_layer", ""), pair.part
    if pair.kind == ATTENTION and part:
        layer, part = f"{layer}.{part}", ""
    if pair.a.is_meta or hasattr(pair.a, "placements") or hasattr(pair.b, "placements"):
        raise ValueError(f"A and B of {layer} are sharded or have no values here: gather the state, and pass that")
    a, b = pair.a.detach(), pair.as_b(pair.b.detach())
    if isinstance(pair.layer, ResLoRALinear) and pair.layer.structure == "bs":  # it adds those of earlier layers too
        a, of_b = (factor.detach() for factor in pair.layer.factors())
        b = of_b[None]
    if pair.kind == EMBEDDING and isinstance(pair.layer, AdapterLayer):
        a = without_row(a, cast(Any, pair.layer).padding_idx)  # which that layer does not adapt, whatever A holds there
    a = pair.as_a(a)
    kind = ATTENTION if pair.name.endswith("base_layer.out_proj") else pair.kind
    if kind != EXPERTS:
        b = b[0] if len(b) == 1 else torch.block_diag(*b)  # the groups of a convolution have rows of their own
        yield Update(
            f"{layer}.{part}" if part else layer, kind, a.flatten(0, 1), b, pair.scale,
            pair.magnitude is not None, pair, layer, part,
        )  # fmt: skip
        return
    for e, (of_a, of_b) in enumerate(zip(a, b, strict=True)):
        name = f"{layer}.{part}[{e}]"
        yield Update(name, EXPERTS, of_a, of_b, pair.scale, pair=pair, layer=layer, part=part, expert=e)


def _of_directory(directory: Path) -> Updates:
    stored = read_stored(directory, to_write=False)
    updates = []
    for layer, own in sorted(stored.layers.items(), key=_in_order):
        dora = any(key.startswith(f"base_model.model.{layer}.{MAGNITUDE}") for key in stored.others)
        stacks = _stacks(layer, stored.fields, sum(each.stacked for each in own))
        for each in own:
            depth = each.part.count("base_layer.")
            part = stacks[len(stacks) - 1 - depth] if each.stacked else ""
            experts = len(each.a) > 1
            of_out = each.part.startswith("base_layer.out_proj.")
            name = f"{layer}.out_proj" if of_out else layer
            kind = EMBEDDING if "embedding" in each.part else CONV if any(each.tails) else LINEAR
            kind = EXPERTS if experts else ATTENTION if of_out or len(own) > 1 else kind
            scale = each.scale * (OUT_PROJ_COUNTED if of_out else 1)
            for e, (a, b) in enumerate(zip(each.a, each.b, strict=True)):
                full, expert = (f"{name}.{part}[{e}]", e) if experts else (name, -1)
                updates.append(Update(full, kind, a, b, scale, dora, None, name, part * experts, expert))
    beside = sorted({key for key in stored.others if MAGNITUDE not in key})
    notes = [_beside(str(directory), beside)] if beside else []
    init = stored.fields.get("init_lora_weights")
    if isinstance(init, str) and _took_part(init):
        notes.append(_started(str(directory), init))
    return Updates(str(directory), updates, tuple(notes), bool(stored.fields.get("fan_in_fan_out")))


def _in_order(item: tuple[str, Any]) -> list[tuple[int, str]]:
    """Return a key that sorts names with their numbers as numbers, since files hold them in no order."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in item[0].split(".")]


def _stacks(layer: str, fields: Mapping[str, Any], count: int) -> list[str]:
    """Return the names of the adapted stacks of a module of experts, the outermost wrapper's last. A file does not tell
    them: PEFT nests its wrappers in the order of the module's parameters, in which down_proj is the last."""
    named = [each.rpartition(".") for each in fields.get("target_parameters") or ()]
    found = sorted({key for module, _, key in named if matches([module], layer)}, reverse=True)
    return found if len(found) == count else [f"stack {i}" for i in range(count)]


def _of_state(state: Mapping[str, Tensor], source: str, lora_alpha: float | None) -> Updates:
    key = next((key for key in (PEFT_KEY, LORALIB_KEY) if any(map(key.fullmatch, state))), None)
    if key is None:
        raise ValueError(f"{source} holds no adapter: its keys are {some(sorted(state))}")
    own = {name: value for name, value in state.items() if key.fullmatch(name)}
    dora = any(MAGNITUDE in name for name in own)
    layers = adapters_of(own, key, dora, source, ()).layers
    if lora_alpha is None:
        raise ValueError(f"{source} does not hold lora_alpha, which s = lora_alpha / r needs: pass it (loralib's is 1)")
    updates = [
        each
        for name, parts in sorted(layers.items(), key=_in_order)
        for each in _of_parts(name, parts, lora_alpha, source)
    ]
    beside = sorted(set(state) - set(own))
    notes = [_beside(source, beside)] if beside else []
    return Updates(source, updates, tuple(notes))


def _of_parts(name: str, parts: Parts, lora_alpha: float, source: str) -> Iterator[Update]:
    """Yield the updates of a layer of a state dict."""
    for first, second in part_pairs(parts):
        a, b = parts[first].flatten(1), parts[second].flatten(1)
        if a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{source}: {name} has A {tuple(parts[first].shape)} and B {tuple(parts[second].shape)}, which are no "
                "product (loralib's MergedLinear, or a convolution with groups): load the model, and analyse that"
            )
        kind = EMBEDDING if "embedding" in first else CONV if parts[first].dim() > 2 else LINEAR
        scale = scaling_of(lora_alpha, a.shape[0], False)
        yield Update(name, kind, a, b, scale, MAGNITUDE in parts, layer=name)


def _took_part(init: str) -> bool:
    """Return whether an adapter with this initialisation is no update of the first W."""
    return init.lower().startswith(_CHANGES_BASE)


def _started(source: str, init: str) -> str:
    if init in _RESTARTED:
        return f"{source} was restarted (ReLoRA): its ΔW is that of the last cycle, and W holds the earlier ones"
    return (
        f"{source} started with init {init!r}, which took a part out of W. So ΔW is an update of the W that was left, "
        "and not what training alone has changed"
    )


def _beside(source: str, keys: list[str]) -> str:
    return f"{source} holds more than low-rank updates, which is not looked at: {some(keys)}"
