"""The checks that stored adapters and a model's layers fit together. Every error names the layers and the way out."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels.models.adapter_files import MAGNITUDE, LayerAdapter, StoredAdapters
from lora_kernels.models.names import plain_names
from lora_kernels.models.targets import some
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.offload import value_of


def refuse_unsaved_parts(layers: dict[str, FusedLoRALinear]) -> None:
    """Raise ValueError where an adapter file cannot hold all of a layer: where it has further parameters, or sharded
    ones, or a base weight that its initialisation has changed."""
    known = {"weight", "bias", "lora_A", "lora_B", f"lora_{MAGNITUDE}"}
    more = [
        f"{name}.{key}" for name, layer in layers.items() for key, _ in layer.named_parameters() if key not in known
    ]
    if more:
        raise ValueError(
            f"only lora_A, lora_B and lora_{MAGNITUDE} are supported here, the model has {some(more)} too; nothing was "
            "changed"
        )
    split = [f"{name} (init={layer.init!r})" for name, layer in layers.items() if layer.init != "kaiming"]
    if split:
        raise ValueError(
            f"the initialisation of these layers changed their base weights: {some(split)}; nothing was changed now. "
            "An adapter file holds no base: save the state_dict of the whole model, or merge_and_unload() it first"
        )
    sharded = [
        f"{name}.{key} (a {type(p).__name__})"
        for name, layer in layers.items()
        for key, p in layer.named_parameters()
        if key.startswith("lora_") and type(p) is not nn.Parameter
    ]
    if sharded:
        raise ValueError(
            f"these adapters are not plain Parameters: {some(sharded)}; nothing was changed. Save from, and load into, "
            "a whole model: get_model_state_dict and set_model_state_dict of torch.distributed.checkpoint.state_dict "
            "move its state from and to a sharded one (options=StateDictOptions(full_state_dict=True))"
        )

    flat = [
        f"{name}.lora_{part} {tuple(p.shape)}"
        for name, layer in layers.items()
        for part, p, shape in (
            ("A", layer.lora_A, (layer.r, layer.in_features)),
            ("B", layer.lora_B, (layer.out_features, layer.r)),
            *([(MAGNITUDE, layer.lora_magnitude_vector, (layer.out_features,))] if layer.use_dora else ()),
        )
        if tuple(p.shape) != shape or not p.is_floating_point() or p.layout != torch.strided
    ]
    if flat:
        raise ValueError(
            f"these adapters are not dense, of the shapes [r, in], [out, r] and [out]: {some(flat)}; nothing was "
            "changed. If FSDP1 has flattened them, do this inside `with FSDP.summon_full_params(model):`"
        )


def values_of(model: nn.Module) -> dict[str, LayerAdapter]:
    """Return the values of every adapter in `model` by plain name, also where accelerate has offloaded them. Raises
    ValueError for one that has no values."""
    values: dict[str, LayerAdapter] = {}
    empty = []
    for name, own_name, layer in plain_names(model):
        if isinstance(layer, FusedLoRALinear):
            keys = ["lora_A", "lora_B", *[f"lora_{MAGNITUDE}"] * layer.use_dora]
            found = [value_of(model, own_name, key) for key in keys]
            empty += [f"{name}.{key}" for key, value in zip(keys, found, strict=True) if value is None or value.is_meta]
            values[name] = LayerAdapter(*found)  # type: ignore[arg-type]
    if empty:
        raise ValueError(
            f"these adapters are on the meta device and have no values: {some(empty)}; nothing was saved. Give them "
            "some first; if the model is offloaded, accelerate's hooks do not have these"
        )
    return values


def refuse_empty(layers: dict[str, FusedLoRALinear]) -> None:
    """Raise ValueError where an adapter is on the meta device, so that nothing can be written into it."""
    empty = [name for name, layer in layers.items() if layer.lora_A.is_meta or layer.lora_B.is_meta]
    if empty:
        raise ValueError(
            f"these adapters are on the meta device: {some(empty)}; nothing was loaded. Materialise them first, with "
            "model.to_empty(device=...) for example. If accelerate has offloaded the model, load the adapter before "
            "that, or take the hooks away with accelerate.hooks.remove_hook_from_submodules(model)"
        )


def check_ties(stored: StoredAdapters, layers: dict[str, FusedLoRALinear]) -> None:
    """Raise ValueError where layers share a parameter for which the file has two values."""
    first: dict[int, tuple[str, torch.Tensor]] = {}
    for name, layer in layers.items():
        a, b, m = stored.layers[name]
        for part, value in (("A", a), ("B", b), (MAGNITUDE, m)):
            own = getattr(layer, f"lora_{part}", None)
            if own is None or value is None:
                continue
            one, other = first.setdefault(id(own), (name, value))
            x, y = (each.to(own.dtype).double() for each in (other, value))
            if one != name and not torch.allclose(x, y, rtol=0, atol=0, equal_nan=True):
                raise ValueError(
                    f"{stored.source}: lora_{part} of {one} and of {name} are one parameter in this model, and two "
                    "different values in the file. Nothing was loaded. Give each layer a parameter of its own first"
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


def check_kind(stored: StoredAdapters, layers: dict[str, FusedLoRALinear]) -> None:
    """Raise ValueError where the file holds DoRA adapters and the model's layers are plain LoRA, or the reverse."""
    source, adapters = stored
    plain = [f"{n}.lora_{MAGNITUDE}" for n, layer in layers.items() if adapters[n].m is not None and not layer.use_dora]
    if plain:
        raise ValueError(
            f"{source} is of DoRA, and the model's layers are not: they have no {some(plain)}. Nothing was loaded. "
            "apply_lora(model, ..., use_dora=True) makes such layers, and so does loading into the plain model"
        )
    dora = [f"{n}.lora_{MAGNITUDE}" for n, layer in layers.items() if adapters[n].m is None and layer.use_dora]
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


def check_shapes(stored: StoredAdapters, name: str, r: int, linear: nn.Linear | FusedLoRALinear) -> None:
    """Raise ValueError where the adapter of `name` does not have rank r or does not fit `linear`."""
    a, b, _ = stored.layers[name]  # adapters_of has checked that m has as many elements as B has rows
    want = (r, linear.in_features), (linear.out_features, r)
    if (tuple(a.shape), tuple(b.shape)) != want:
        raise ValueError(
            f"{stored.source}: {name}.lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} should be {want[0]} and "
            f"{want[1]} in this model: another base, or another rank. Nothing was loaded"
        )
