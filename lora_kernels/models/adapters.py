"""Adapters to and from disk: PEFT's format both ways, loralib's for reading."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_kernels.models import inject
from lora_kernels.models.adapter_files import (
    CONFIG,
    LORALIB_KEY,
    MAGNITUDE,
    PEFT_KEY,
    WEIGHTS,
    Adapter,
    Adapters,
    adapters_of,
    bare,
    config_of,
    read_config,
    read_weights,
    safetensors_torch,
    write_all,
)
from lora_kernels.models.inject import AdaptedLayer, ApplyReport
from lora_kernels.models.targets import Selection, by_pattern, lora_layers, select, some
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.settings import scaling_of


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of every `FusedLoRALinear` in `model` to `directory` in PEFT's format, from where
    ``PeftModel.from_pretrained`` and `load_adapter` read them.

    A and B are written in their own dtype under ``base_model.model.<name>.lora_A.weight`` and ``.lora_B.weight``,
    DoRA's m under ``.lora_magnitude_vector``.
    r and lora_alpha that differ between layers go to rank_pattern and alpha_pattern. lora_alpha is written, not
    `scaling`: a layer that is switched off by ``scaling = 0`` is saved whole. A merged layer's adapter is saved too.
    Trained parameters outside the adapters are not saved: a warning names them.

    Both files are written in full, and to the disk, under temporary names in the same directory; then each takes the
    place of the old one by a rename, the weights first and the config last. An error on the way leaves the old files as
    they were. A crash of the machine does so as well, unless it falls between the two renames: the weights are then
    the new ones and the config is the old one (which matters only if r, lora_alpha or the layers have changed).

    Raises:
        ValueError: the model has no `FusedLoRALinear`, is one itself (it has no name to save under), has layers with
            other parameters beside these, or sharded ones, or layers that differ in use_rslora or use_dora, of which
            the format has one.
        ImportError: safetensors is not installed.
    """
    st = safetensors_torch()
    model = bare(model)
    layers = lora_layers(model)
    if not layers or "" in layers:
        what = "is a FusedLoRALinear itself: put it in a module, for a name" if layers else "has no FusedLoRALinear"
        raise ValueError(f"the model {what}; nothing was saved")
    _only_plain(layers)
    own = {id(parameter) for parameter in inject.adapter_parameters(model)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        warnings.warn(f"these trained parameters are in no adapter and were not saved: {some(others)}", stacklevel=2)
    config = config_of(model, layers)
    tensors = {}
    for name, layer in layers.items():
        a, b, m = _parameters(layer)
        for part, tensor in (("A.weight", a), ("B.weight", b), (MAGNITUDE, m)):
            if tensor is not None:
                tensors[f"base_model.model.{name}.lora_{part}"] = tensor.detach().cpu().contiguous()
    weights = st.save(tensors, metadata={"format": "pt"})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_all(
        {
            directory / WEIGHTS: weights,
            directory / CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
        }
    )


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> ApplyReport:
    """Load an adapter in PEFT's format, made by PEFT or by `save_adapter`, from `directory` into `model`.

    A model with `FusedLoRALinear` layers must have them where the file has adapters, of the same ranks, and with
    use_dora where the file is of DoRA. A, B and m are written into its parameters (and rounded to their dtype);
    lora_alpha, use_rslora and scaling become the config's, lora_dropout and what is trained stay the model's. A plain
    model gets LoRA first, as by `apply_lora` with the config's settings: the adapters train, everything else is frozen.
    A, B and m are then of the weight's dtype if the file is, and fp32 beside other fp16 and bf16 weights. Whether the
    model is in training mode stays as it is.

    The base is known by its names and shapes only: whether its weights are those that the adapter was trained beside
    is not in the files.

    Returns:
        the layers that were loaded.

    Raises:
        FileNotFoundError: one of the two files is missing (``adapter_model.bin``, a pickle, is not read).
        ValueError: a file that is cut short or is not what its name says; keys that are missing or that the model has
            no place for; other shapes or ranks; DoRA into layers without it, or the reverse; a config with something
            that `FusedLoRALinear` does not compute (lora_bias, modules_to_save, an initialisation that changes the
            base, ...); a merged layer, or a sharded one.
        ImportError: safetensors is not installed.
        Whatever is raised, the model is as it was.
    """
    directory, model = Path(directory), bare(model)
    config = read_config(directory / CONFIG)
    dora = bool(config.get("use_dora", False))
    adapters = adapters_of(read_weights(directory / WEIGHTS), PEFT_KEY, dora, str(directory / WEIGHTS))
    layers = lora_layers(model)
    r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for name, (a, _, _) in adapters.items():
        rank = by_pattern(ranks, name, r)
        if a.shape[0] != rank:
            raise ValueError(
                f"{directory}: {name}.lora_A is {tuple(a.shape)}, but r (or rank_pattern) in {CONFIG} is {rank}: the "
                "two files are not of one adapter. Nothing was loaded"
            )
    rslora = bool(config.get("use_rslora", False))
    if layers:
        return _fill(model, adapters, {n: by_pattern(alphas, n, alpha) for n in adapters}, rslora, str(directory))
    try:
        selection = select(
            model,
            r=r,
            lora_alpha=alpha,
            target_modules=config.get("target_modules") or (),
            exclude_modules=config.get("exclude_modules"),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            layers_to_transform=config.get("layers_to_transform"),
            layers_pattern=config.get("layers_pattern"),
        )
    except ValueError as error:
        raise ValueError(
            f"{directory} is an adapter of another base, or of layers not supported here: {error}"
        ) from None
    for target in selection.targets:
        target.settings.update(lora_dropout=config.get("lora_dropout", 0.0), use_rslora=rslora, use_dora=dora)
    return _apply(model, selection, adapters, str(directory))


def load_loralib(
    model: nn.Module,
    state: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    lora_alpha: float | None = None,
) -> ApplyReport:
    """Load what ``loralib.lora_state_dict`` gives (``<name>.lora_A`` [r, in], ``<name>.lora_B`` [out, r]) into `model`.

    Args:
        model: with `FusedLoRALinear` layers exactly where the state has adapters and of its ranks, or a plain model,
            which gets them there (as by `apply_lora`, everything else frozen).
        state: the dictionary, or a safetensors file. A ``.pt`` file is a pickle and is not opened here: pass
            ``torch.load(path, weights_only=True)``.
        lora_alpha: the files do not hold it. Required for a plain model (loralib's own default is 1); None leaves the
            layers of another as they are.

    Biases in the state (``lora_state_dict(model, bias="all")``) are written into the parameters of that name.
    loralib's MergedLinear, Embedding and convolutions are refused, and so are layers with DoRA. Raises as
    `load_adapter`.
    """
    model = bare(model)
    if isinstance(state, Mapping):
        state, source = dict(state), "the state dict"
    elif Path(state).suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{state} is a pickle and is not opened here: pass torch.load(path, weights_only=True)")
    else:
        state, source = read_weights(Path(state)), str(state)
    biases = {key: state.pop(key) for key in list(state) if key.rpartition(".")[2] == "bias"}
    adapters = adapters_of(state, LORALIB_KEY, False, source)
    own = dict(model.named_parameters())
    bad = [key for key, value in biases.items() if key not in own or own[key].shape != value.shape]
    if bad:
        raise ValueError(f"{source}: the model has no such bias, or one of another shape: {some(bad)}")
    layers = lora_layers(model)
    if layers:
        alphas = {name: layer.lora_alpha if lora_alpha is None else lora_alpha for name, layer in layers.items()}
        report = _fill(model, adapters, alphas, None, source)
    elif lora_alpha is None:
        raise ValueError("a loralib checkpoint does not hold lora_alpha: pass it (loralib's default is 1)")
    else:
        exact = "|".join(map(re.escape, adapters))
        try:
            selection = select(model, r=1, lora_alpha=lora_alpha, target_modules=exact)
        except ValueError as error:
            raise ValueError(f"{source} is of another base, or of layers not supported here: {error}") from None
        for target in selection.targets:
            target.settings["r"] = adapters[target.name].a.shape[0]
        report = _apply(model, selection, adapters, source)
    with torch.no_grad():
        for key, value in biases.items():
            own[key].copy_(value)
    return report


# --- into the model ---


def _apply(model: nn.Module, selection: Selection, adapters: Adapters, source: str) -> ApplyReport:
    """LoRA into a plain model, with the values of `adapters`."""
    _same_names(set(adapters), {target.name for target in selection.targets}, dict(model.named_modules()), source)
    for target in selection.targets:
        adapter = adapters[target.name]
        _same_shapes(target.name, adapter, target.settings["r"], target.linear, source)
        dtype = target.linear.weight.dtype
        other = any(tensor.dtype != dtype for tensor in adapter if tensor is not None)
        halves = (torch.float16, torch.bfloat16)
        target.settings["adapter_dtype"] = torch.float32 if dtype in halves and other else None
    report = inject.replace(model, selection)
    layers = lora_layers(model)
    for name, adapter in adapters.items():
        _copy(layers[name], adapter)
    return report


def _fill(
    model: nn.Module, adapters: Adapters, alphas: dict[str, float], rslora: bool | None, source: str
) -> ApplyReport:
    """The values of `adapters` into layers that are there."""
    layers = lora_layers(model)
    _only_plain(layers)
    _same_names(set(adapters), set(layers), dict(model.named_modules()), source)
    _same_kind(adapters, layers, source)
    for name, layer in layers.items():
        _same_shapes(name, adapters[name], layer.r, layer, source)
        if not math.isfinite(alphas[name]):
            raise ValueError(f"{source}: lora_alpha of {name} is {alphas[name]}")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"these layers are merged: {some(merged)}. unmerge() them first")
    for name, layer in layers.items():
        _copy(layer, adapters[name])
        layer.lora_alpha = alphas[name]
        layer.use_rslora = layer.use_rslora if rslora is None else rslora
        layer.scaling = scaling_of(layer.lora_alpha, layer.r, layer.use_rslora)
    return ApplyReport(tuple(AdaptedLayer.of(name, layer) for name, layer in layers.items()), {}, ())


def _only_plain(layers: dict[str, FusedLoRALinear]) -> None:
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
            f"the base weights of these layers were changed as their adapters began: {some(split)}; nothing was "
            "changed now. An adapter file holds no base: save the state_dict of the whole model, or merge_and_unload() "
            "it first"
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


def _parameters(layer: FusedLoRALinear) -> Adapter:
    return Adapter(layer.lora_A, layer.lora_B, layer.lora_magnitude_vector if layer.use_dora else None)


@torch.no_grad()
def _copy(layer: FusedLoRALinear, adapter: Adapter) -> None:
    for parameter, value in zip(_parameters(layer), adapter, strict=True):
        if parameter is not None and value is not None:
            parameter.copy_(value)


def _same_kind(adapters: Adapters, layers: dict[str, FusedLoRALinear], source: str) -> None:
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


def _same_names(have: set[str], want: set[str], modules: Mapping[str, nn.Module], source: str) -> None:
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
            f"{source} does not fit this model: {'; '.join(problems)}. Nothing was loaded. Is it the base that the "
            "adapter was made for, with LoRA in the same places?"
        )


def _same_shapes(name: str, adapter: Adapter, r: int, linear: nn.Linear, source: str) -> None:
    a, b, _ = adapter  # m is of B's rows, as adapters_of knows
    want = (r, linear.in_features), (linear.out_features, r)
    if (tuple(a.shape), tuple(b.shape)) != want:
        raise ValueError(
            f"{source}: {name}.lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} should be {want[0]} and {want[1]} "
            "in this model: another base, or another rank. Nothing was loaded"
        )
