"""The checks that stored adapters and a model's layers fit together. Every error names the layers and the way out."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels.models.adapter_files import MAGNITUDE, Parts, StoredAdapters, shown
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import plain_names
from lora_kernels.models.targets import some
from lora_kernels.nn.adapter import AdapterLayer, FilePart, is_adapter
from lora_kernels.nn.offload import value_of


def refuse_unsaved_parts(layers: dict[str, AdapterLayer]) -> None:
    """Raise ValueError where an adapter file cannot hold all of a layer: where PEFT's format has no place for its
    adapter, where the adapter has further parameters, or sharded ones, or where its initialisation has changed the
    base."""
    parts: dict[str, dict[str, FilePart]] = {}
    for name, layer in layers.items():
        try:
            parts[name] = layer.file_parts()
        except ValueError as error:
            raise ValueError(f"{name}: {error}; nothing was changed") from None
    more = [
        f"{name}.{key}"
        for name, layer in layers.items()
        for key in _names_of_adapter(layer) ^ {part.parameter for part in parts[name].values()}
    ]
    if more:
        raise ValueError(
            f"the adapters of these layers have other parameters than PEFT's format knows: {some(sorted(more))}; "
            "nothing was changed"
        )
    split = [f"{name} (init={layer.init!r})" for name, layer in layers.items() if layer.splits_base]
    if split:
        raise ValueError(
            f"the initialisation, or a restart, of these layers changed their base weights: {some(split)}; nothing was "
            "changed now. An adapter file holds no base: save the state_dict of the whole model, or merge_and_unload() "
            "it first"
        )
    sharded = [
        f"{name}.{key} (a {type(p).__name__})"
        for name, layer in layers.items()
        for key, p in layer.named_parameters()
        if is_adapter(key) and type(p) is not nn.Parameter
    ]
    if sharded:
        raise ValueError(
            f"these adapters are not plain Parameters: {some(sharded)}; nothing was changed. Save from, and load into, "
            "a whole model: get_model_state_dict and set_model_state_dict of torch.distributed.checkpoint.state_dict "
            "move its state from and to a sharded one (options=StateDictOptions(full_state_dict=True))"
        )

    flat = [
        f"{name}.{part.parameter} {tuple(p.shape)} instead of {shape}"
        for name, layer in layers.items()
        for key, part in parts[name].items()
        for p, shape in [(layer.get_parameter(part.parameter), own_shape(layer, key, part))]
        if tuple(p.shape) != shape or not p.is_floating_point() or p.layout != torch.strided
    ]
    if flat:
        raise ValueError(
            f"these adapters are not dense, or not of their shapes: {some(flat)}; nothing was changed. If FSDP1 has "
            "flattened them, do this inside `with FSDP.summon_full_params(model):`"
        )


def _names_of_adapter(layer: AdapterLayer) -> set[str]:
    """Return the names of the parameters of an adapter, which have "lora_" in them also where they are parametrised."""
    return {name for name, _ in layer.named_parameters() if "lora_" in name}


def own_shape(layer: AdapterLayer, key: str, part: FilePart) -> tuple[int, ...]:
    """Return the shape in which a layer holds the part `key` of its file."""
    return tuple(layer.from_file(key, torch.empty(part.shape, device="meta")).shape)


def values_of(model: nn.Module) -> dict[str, Parts]:
    """Return the values of every adapter in `model` by plain name, in the layout of PEFT's file, also where accelerate
    has offloaded them. Raises ValueError for one that has no values."""
    values: dict[str, Parts] = {}
    empty = []
    own_names = {name: own_name for name, own_name, _ in plain_names(model)}
    for name, layer in lora_layers(model).items():
        values[name] = {}
        for key, part in layer.file_parts().items():
            inside, _, parameter = f"{own_names[name]}.{part.parameter}".rpartition(".")
            value = value_of(model, inside, parameter)
            if value is None or value.is_meta:
                empty.append(f"{name}.{part.parameter}")
            else:
                values[name][key] = layer.to_file(key, value)
    if empty:
        raise ValueError(
            f"these adapters are on the meta device and have no values: {some(empty)}; nothing was saved. Give them "
            "some first; if the model is offloaded, accelerate's hooks do not have these"
        )
    return values


def refuse_empty(layers: dict[str, AdapterLayer]) -> None:
    """Raise ValueError where an adapter is on the meta device, so that nothing can be written into it."""
    empty = [
        name
        for name, layer in layers.items()
        if any(is_adapter(key) and p.is_meta for key, p in layer.named_parameters())
    ]
    if empty:
        raise ValueError(
            f"these adapters are on the meta device: {some(empty)}; nothing was loaded. Materialise them first, with "
            "model.to_empty(device=...) for example. If accelerate has offloaded the model, load the adapter before "
            "that, or take the hooks away with accelerate.hooks.remove_hook_from_submodules(model)"
        )


def check_ties(stored: StoredAdapters, layers: dict[str, AdapterLayer]) -> None:
    """Raise ValueError where layers share a parameter for which the file has two values."""
    first: dict[int, tuple[str, torch.Tensor]] = {}
    for name, layer in layers.items():
        for key, part in layer.file_parts().items():
            own, value = layer.get_parameter(part.parameter), layer.from_file(key, stored.layers[name][key])
            one, other = first.setdefault(id(own), (name, value))
            x, y = (each.to(own.dtype).double() for each in (other, value))
            if one != name and not torch.allclose(x, y, rtol=0, atol=0, equal_nan=True):
                raise ValueError(
                    f"{stored.source}: {part.parameter} of {one} and of {name} are one parameter in this model, and "
                    "two different values in the file. Nothing was loaded. Give each layer a parameter of its own first"
                )


def _part_of(have: set[str], modules: dict[str, nn.Module]) -> str:
    """Return the sentence about the cause of names that do not fit."""
    first = min(have).partition(".")[0]
    if all(name.startswith(f"{first}.") and name.removeprefix(f"{first}.") in modules for name in have):
        return f"It was saved from a module that holds this one as {some([first])!r}: save and load the same module"
    for child, module in modules.items():
        if child and "." not in child and all(f"{child}.{name}" in modules for name in have):
            return f"Its names are those of modules inside {child!r} (a {type(module).__name__}): load it into that one"
    return "Is the model the base that the adapter was made for, with LoRA in the same places?"


def check_kind(stored: StoredAdapters, layers: dict[str, AdapterLayer]) -> None:
    """Raise ValueError where the file holds DoRA adapters and the model's layers are plain LoRA, or the reverse."""
    source, adapters = stored
    plain = [f"{n}.{MAGNITUDE}" for n, layer in layers.items() if MAGNITUDE in adapters[n] and not layer.use_dora]
    if plain:
        raise ValueError(
            f"{source} is of DoRA, and the model's layers are not: they have no {some(plain)}. Nothing was loaded. "
            "apply_lora(model, ..., use_dora=True) makes such layers, and so does loading into the plain model"
        )
    dora = [f"{n}.{MAGNITUDE}" for n, layer in layers.items() if MAGNITUDE not in adapters[n] and layer.use_dora]
    if dora:
        raise ValueError(
            f"{source} is of plain LoRA, and the model's layers are DoRA: it has no {some(dora)}. Nothing was loaded. "
            "Load it into a model whose layers have use_dora=False, or into the plain model"
        )


def check_names(stored: StoredAdapters, want: set[str], model: nn.Module) -> None:
    """Raise ValueError where the file's adapters are not exactly those of the layers `want`."""
    have, modules = set(stored.layers), {name: module for name, _, module in plain_names(model)}
    missing, surplus = sorted(want - have), sorted(have - want)
    problems = []
    if missing:
        problems.append(f"it has no lora_A and lora_B for {some(missing)}")
    absent = [name for name in surplus if name not in modules]
    if absent:
        problems.append(f"the model has no place for {some(absent)}")
    present = [f"{name} (a {type(modules[name]).__name__})" for name in surplus if name in modules]
    if present:
        problems.append(f"it has adapters for layers that are not to get any: {some(present)}")
    if problems:
        raise ValueError(
            f"{stored.source} does not fit this model: {'; '.join(problems)}. Nothing was loaded. "
            f"{_part_of(have, modules)}"
        )


def check_shapes(stored: StoredAdapters, name: str, layer: AdapterLayer) -> None:
    """Raise ValueError where the stored adapter of `name` does not have the parts of `layer`, or not its rank and
    sizes."""
    have, want = stored.layers[name], layer.file_parts()
    if have.keys() != want.keys():
        raise ValueError(
            f"{stored.source}: the adapter of {name} has {some([shown(part) for part in have])}, and that of a "
            f"{type(layer).__name__} has {some([shown(part) for part in want])}: another base. Nothing was loaded"
        )
    odd = [key for key, part in want.items() if tuple(have[key].shape) != part.shape]
    if odd:
        got = " and ".join(f"{shown(key)} {tuple(have[key].shape)}" for key in odd)
        raise ValueError(
            f"{stored.source}: {name}.{got} should be {' and '.join(str(want[key].shape) for key in odd)} in this "
            "model: another base, or another rank. Nothing was loaded"
        )
