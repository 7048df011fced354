"""The adapters of a model whose layers share A and B, on disk: PEFT's format of VeRA, and one of Tied-LoRA.

A file has u and v of each layer under ``base_model.model.<name>.``, and A and B once, as PEFT's files of VeRA:

    format       peft_type    A                   B                   u                 v
    VeRA         VERA         base_model.vera_A   base_model.vera_B   vera_lambda_d     vera_lambda_b
    Tied-LoRA    TIED_LORA    base_model.tied_A   base_model.tied_B   tied_u            tied_v

PEFT has no Tied-LoRA, so it refuses the second by its peft_type. A model is saved as VeRA where A and B are frozen and
s = 1, which is all that PEFT computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.models.adapter_config import CONFIG, notes_of, target_of
from lora_kernels.models.adapter_values import written
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import WRAPPER, plain_name, plain_names
from lora_kernels.models.reports import AdaptedLayer, ApplyReport
from lora_kernels.models.selection import select
from lora_kernels.models.shared import factors_for, put_shared, shared_selection
from lora_kernels.models.shared_config import FORMATS, TIED, TRAINED, VERA, SharedConfig
from lora_kernels.models.targets import some
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.conv1d import FusedLoRAConv1D
from lora_kernels.nn.settings import scaling_of
from lora_kernels.nn.shared import SharedAdapter
from lora_kernels.nn.shared_factors import SharedFactors, drawn


def load(model: nn.Module, directory: Path, config: SharedConfig, tensors: Mapping[str, Tensor]) -> ApplyReport:
    """Write the tensors of a file into the layers of `model`, which it gets first where it has none. `load_adapter`
    documents it. On an error nothing is changed."""
    names = {name: module for name, _, module in plain_names(model)}
    rules = config.rules.for_names(names, directory / CONFIG).rules
    layers, factors = _parts(tensors, config, str(directory), names)
    present = lora_layers(model)
    if present:
        return _fill(model, present, config, layers, factors, str(directory))
    try:
        selection = shared_selection(select(model, config.settings, rules))
    except ValueError as error:
        why = f"{directory} is an adapter of another base, or of layers not supported here: {error}"
        raise ValueError(why) from None
    _check_names(str(directory), set(layers), {target.name for target in selection.targets}, names)
    made = factors_for(selection, key=config.key, save_projection=config.save_projection, **config.train)
    values = _factor_values(made, made.in_features, made.out_features, config, factors, str(directory))

    def fill(name: str, layer: AdapterLayer) -> None:
        with written(_vectors(name, layer, layers[name], str(directory))):
            pass

    with written(values):
        return put_shared(model, selection, made, fill)


def _fill(
    model: nn.Module,
    present: Mapping[str, AdapterLayer],
    config: SharedConfig,
    layers: Mapping[str, dict[str, Tensor]],
    factors: Mapping[str, Tensor],
    source: str,
) -> ApplyReport:
    """Write the values into the layers that the model has."""
    others = [name for name, layer in present.items() if not isinstance(layer, SharedAdapter)]
    if others:
        raise ValueError(
            f"{source} is of layers that share A and B, and these have some of their own: {some(others)}. Nothing was "
            "loaded. Load it into the plain model"
        )
    _check_names(source, set(layers), set(present), {name: module for name, _, module in plain_names(model)})
    own = _one_factors(present)
    merged = [name for name, layer in present.items() if layer.merged]
    if merged:
        raise ValueError(f"these layers are merged: {some(merged)}. unmerge() them first")
    _refuse_without_values(present, own, "loaded")
    if own.r != config.settings.r:
        raise ValueError(f"{source} has r={config.settings.r}, and the model r={own.r}. Nothing was loaded")
    K, N = _widest(present)
    values = _factor_values(own, K, N, config, factors, source)
    for name, layer in present.items():
        values += _vectors(name, layer, layers[name], source)
    with written(values):
        for layer in present.values():
            layer.lora_alpha = config.settings.lora_alpha
            layer.use_rslora = False
            layer.scaling = scaling_of(layer.lora_alpha, layer.r, False)
        own.key, own.save_projection = config.key, config.save_projection
    return ApplyReport(tuple(AdaptedLayer.of(name, layer) for name, layer in present.items()), {}, ())


def _parts(
    tensors: Mapping[str, Tensor], config: SharedConfig, source: str, names: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return u and v of each layer, and A and B where the file has them, under the names "u", "v", "A" and "B"."""
    format = FORMATS[config.format]
    of_layer = re.compile(rf"({WRAPPER}\.)*base_model\.model\.(?P<layer>.+)\.(?P<part>{format.u}|{format.v})")
    of_factor = re.compile(rf"({WRAPPER}\.)*base_model\.{format.factor}(?P<part>[AB])")
    layers: dict[str, dict[str, Tensor]] = {}
    factors: dict[str, Tensor] = {}
    surplus, twice, odd = [], [], []
    for key, value in sorted(tensors.items()):
        if match := of_layer.fullmatch(key):
            own = layers.setdefault(plain_name(match["layer"], names), {})
            part = "u" if match["part"] == format.u else "v"
        elif match := of_factor.fullmatch(key):
            own, part = factors, match["part"]
        else:
            surplus.append(key)
            continue
        if part in own:
            twice.append(key)
        if not value.is_floating_point() or value.ndim != (2 if own is factors else 1):
            odd.append(f"{key} ({value.dtype} {tuple(value.shape)})")
        own[part] = value
    if surplus:
        raise ValueError(f"{source} has keys that are none of {config.format}: {some(surplus)}; nothing was loaded")
    if twice:
        raise ValueError(f"{source} has two values for {some(twice)}, under two names; nothing was loaded")
    if odd:
        raise ValueError(f"{source} has tensors that are no adapter's: {some(odd)}; nothing was loaded")
    missing = [
        f"{name}.{format.u if p == 'u' else format.v}" for name, own in layers.items() for p in "uv" if p not in own
    ]
    needed = config.format == TIED or config.save_projection
    missing += [f"base_model.{format.factor}{p}" for p in "AB" if p not in factors and (needed or factors)]
    if missing:
        raise ValueError(f"{source} lacks {some(missing)}; nothing was loaded")
    if not layers:
        raise ValueError(f"{source} holds no adapter")
    return layers, factors


def _factor_values(
    own: SharedFactors, K: int, N: int, config: SharedConfig, factors: Mapping[str, Tensor], source: str
) -> list[tuple[Tensor, Tensor]]:
    """Return the views of `own` to write to, with the values of A [r, K] and B [N, r] of the file, or else those that
    are drawn from its key. A file may hold wider ones, whose first columns and rows these are."""
    if factors:
        a, b = factors["A"], factors["B"]
        if a.shape[0] != own.r or b.shape[1] != own.r or a.shape[1] < K or b.shape[0] < N:
            raise ValueError(
                f"{source}: A {tuple(a.shape)} and B {tuple(b.shape)} should be [{own.r}, {K}] and [{N}, {own.r}] in "
                "this model: another base, or another rank. Nothing was loaded"
            )
    else:
        assert config.key is not None
        a, b = drawn(config.key, own.r, K, N)
    return [(own.lora_A.detach()[:, :K], a[:, :K]), (own.lora_B.detach()[:N], b[:N])]


def _vectors(name: str, layer: Any, parts: Mapping[str, Tensor], source: str) -> list[tuple[Tensor, Tensor]]:
    """Return u and v of a layer with their values. Raises ValueError for other sizes."""
    pairs = [(layer.lora_u, parts["u"]), (layer.lora_v, parts["v"])]
    odd = [f"{part} {tuple(value.shape)} for {tuple(own.shape)}" for part, (own, value) in zip("uv", pairs, strict=True)
           if own.shape != value.shape]  # fmt: skip
    if odd:
        raise ValueError(f"{source}: {name} has {some(odd)}: another base, or another rank. Nothing was loaded")
    return pairs


def _check_names(source: str, have: set[str], want: set[str], modules: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where the file's layers are not exactly those of the model."""
    missing, surplus = sorted(want - have), sorted(have - want)
    if missing or surplus:
        told = [f"it has nothing for {some(missing)}"] * bool(missing)
        told += [f"the model has no adapted layer {some(surplus)}"] * bool(surplus)
        raise ValueError(
            f"{source} does not fit this model: {'; '.join(told)}. Nothing was loaded. Is the model the base that the "
            "adapter was made for?"
        )


def contents(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of the file that holds the adapters of `model`. `save_adapter` documents it.

    Raises ValueError where some layers have an A and B of their own, or others' factors; where the adapters are sharded
    or have no values; and where A and B are to be left out, but are not those of their key.
    """
    others = [name for name, layer in layers.items() if not isinstance(layer, SharedAdapter)]
    if others:
        raise ValueError(f"one file cannot hold shared factors and adapters with their own: {some(others)}")
    own = _one_factors(layers)
    _refuse_without_values(layers, own, "saved")
    every: list[Any] = list(layers.values())
    frozen = not (own.lora_A.requires_grad or own.lora_B.requires_grad)
    scales = {float(layer.lora_alpha) / layer.r for layer in every}
    kind = VERA if frozen and scales == {1.0} else TIED
    if len({layer.lora_alpha for layer in every}) > 1:
        raise ValueError(f"lora_alpha differs between layers: {sorted({layer.lora_alpha for layer in every})}")
    format, (K, N) = FORMATS[kind], _widest(layers)
    a, b = own.lora_A.detach()[:, :K], own.lora_B.detach()[:N]
    tensors = {f"base_model.{format.factor}A": a, f"base_model.{format.factor}B": b}
    if kind == VERA and not own.save_projection:
        _refuse_changed(own, a, b)
        tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.{format.u}"] = layer.get_parameter("lora_u").detach()
        tensors[f"base_model.model.{name}.{format.v}"] = layer.get_parameter("lora_v").detach()
    first, dropout = every[0], max(layer.lora_dropout for layer in every)
    config = {"peft_type": kind, **notes_of(model), "r": own.r, "target_modules": target_of(model, layers)}
    if kind == VERA:
        config |= {
            "projection_prng_key": 0 if own.key is None else own.key,
            "save_projection": own.save_projection,
            "vera_dropout": dropout,
            "d_initial": first._first[0],
            "fan_in_fan_out": any(isinstance(layer, FusedLoRAConv1D) for layer in every),
            "bias": "none",
        }
    else:
        wants = (own.lora_A, own.lora_B, first.lora_u, first.lora_v)
        config |= {"lora_alpha": first.lora_alpha, "lora_dropout": dropout}
        config |= {name: p.requires_grad for name, p in zip(TRAINED, wants, strict=True)}
    return config, tensors


def _refuse_changed(own: SharedFactors, a: Tensor, b: Tensor) -> None:
    """Raise ValueError where A and B are not those that a reader of the file would draw."""
    if own.key is not None:
        drawn_a, drawn_b = drawn(own.key, own.r, a.shape[1], b.shape[0])
        if all(torch.equal(t.cpu(), other.to(t.dtype)) for t, other in ((a, drawn_a), (b, drawn_b))):
            return
    raise ValueError(
        f"save_projection is False, but A and B are not those that key {own.key} gives: nothing was saved. Set "
        "model.lora_shared.save_projection = True"
    )


def _one_factors(layers: Mapping[str, Any]) -> SharedFactors:
    """Return the factors of all layers. Raises ValueError where they have several."""
    found = {id(layer.factors): layer.factors for layer in layers.values()}
    if len(found) > 1:
        raise ValueError(f"the layers have {len(found)} pairs of shared factors, and a file holds one: save each alone")
    own: SharedFactors = next(iter(found.values()))
    return own


def _widest(layers: Mapping[str, Any]) -> tuple[int, int]:
    """Return the columns of A and the rows of B that the layers need, as PEFT finds them."""
    return max(layer.in_features for layer in layers.values()), max(layer.out_features for layer in layers.values())


def _refuse_without_values(layers: Mapping[str, Any], own: SharedFactors, done: str) -> None:
    """Raise ValueError where a part of the adapter is sharded or on the meta device."""
    named = {"lora_shared.lora_A": own.lora_A, "lora_shared.lora_B": own.lora_B}
    for name, layer in layers.items():
        named |= {f"{name}.lora_u": layer.lora_u, f"{name}.lora_v": layer.lora_v}
    bad = [
        f"{name} ({type(p).__name__} on {p.device})"
        for name, p in named.items()
        if type(p) is not nn.Parameter or p.is_meta or not p.numel()
    ]
    if bad:
        raise ValueError(
            f"these adapters are sharded, flattened or without values: {some(bad)}; nothing was {done}. Materialise "
            "them with model.to_empty(device=...), or do this with a whole model: get_model_state_dict and "
            "set_model_state_dict of torch.distributed.checkpoint.state_dict move the state of a sharded one"
        )
