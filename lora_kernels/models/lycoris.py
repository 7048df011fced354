"""`load_lycoris` reads the LoRA and LoCon files of LyCORIS and of kohya's sd-scripts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.models.adapter_files import Parts, StoredAdapters, check_values, read_weights
from lora_kernels.models.foreign import Foreign, fitted, put_foreign
from lora_kernels.models.names import plain_names
from lora_kernels.models.reports import ApplyReport
from lora_kernels.models.targets import some

_KEY = re.compile(r"(?P<layer>[^.]+)\.(?P<part>lora_down\.weight|lora_up\.weight|lora_mid\.weight|alpha)")
_OTHER_METHOD = re.compile(
    r"[^.]+\.(hada_w[12](_[ab])?|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2|dora_scale|diff|diff_b|on_input|oft_blocks|"
    r"oft_diag|rescale|w_norm|b_norm|a1\.weight|a2\.weight|weight)"
)
"""The keys of LoHa, LoKr, full differences and others, which are refused by name."""
_PREFIX = re.compile(r"lora_(?:unet|te\d*|transformer|prior|prior_unet|prior_te)_|lycoris_")
"""What the tools put before the name of a module: which of the models in a pipeline it is in."""


def load_lycoris(
    model: nn.Module, state: Mapping[str, Tensor] | str | os.PathLike[str], *, prefix: str | None = None
) -> ApplyReport:
    """Load a LoRA or LoCon of LyCORIS or kohya's sd-scripts into `model`: ``<prefix><name>.lora_down.weight`` (A),
    ``.lora_up.weight`` (B), ``.alpha`` and, for a convolution in Tucker form, ``.lora_mid.weight``. The dots of a
    module's name are underscores there.

    Linear layers have A [r, in] and B [out, r]; convolutions A [r, C, k...] and B [N, r, 1...], which are PEFT's. In
    Tucker form A [r, C, 1...], T [r, r, k...] and B [N, r, 1...] are three convolutions one after the other, and the
    first two are one: A' = Σ_q T[·, q] A[q], which is exact. A file without alpha has s = 1. `save_adapter` then writes
    the model's adapters in PEFT's format.

    Args:
        model: a model with adapters exactly where the file has them, with its ranks; or a plain model, which gets such
            layers, as by `apply_lora`, with everything else frozen.
        state: the dictionary, or a safetensors file. A pickle is not opened here.
        prefix: what stands before the names of this model's modules, such as "lora_unet_". The layers of other
            prefixes are left out, and the report's `passed_over` tells them. None takes a file with one prefix.

    Raises ValueError for LyCORIS's other methods (LoHa, LoKr, full differences, ``dora_scale``, ...), which are no
    product of A and B, and for a name that two modules of the model have. Returns and raises as `load_adapter`
    otherwise.
    """
    if isinstance(state, Mapping):
        tensors, source = dict(state), "the state dict"
    else:
        tensors, source = read_weights(Path(state)), str(state)
    modules = {name: module for name, _, module in plain_names(model) if name}
    found, left_out = _by_name(tensors, source, prefix)
    names = _real_names(modules, found, source)
    layers: dict[str, Parts] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for written, parts in found.items():
        name = names[written]
        layers[name] = _parts(parts, modules[name], name, source)
        ranks[name] = int(layers[name]["lora_A.weight"].shape[0])
        alpha = parts.get("alpha", torch.tensor(float(ranks[name])))
        if alpha.numel() != 1:
            raise ValueError(f"{source}: alpha of {name} is {tuple(alpha.shape)}, not a number; nothing was loaded")
        alphas[name] = float(alpha)
    report = put_foreign(model, Foreign(StoredAdapters(source, layers), ranks, alphas))
    report.passed_over.update(dict.fromkeys(left_out, f"its prefix is not {prefix!r}"))
    return report


def is_of_lycoris(keys: Iterable[str]) -> bool:
    """Return whether every key of a file is one that `load_lycoris` knows, or of another method of these tools."""
    return all(_KEY.fullmatch(key) or _OTHER_METHOD.fullmatch(key) for key in keys)


def _by_name(tensors: Mapping[str, Tensor], source: str, prefix: str | None) -> tuple[dict[str, Parts], list[str]]:
    """Return the tensors of each layer by its name in the file without the prefix, and the layers of other prefixes.
    Raises ValueError for keys of other methods, and for layers that lack a part."""
    found: dict[str, Parts] = {}
    surplus, prefixes = [], set[str]()
    for key, tensor in sorted(tensors.items()):
        match = _KEY.fullmatch(key)
        if match is None:
            surplus.append(key)
        else:
            found.setdefault(match["layer"], {})[match["part"]] = tensor
    if surplus:
        raise ValueError(
            f"{source} has keys of another method than LoRA and LoCon: {some(surplus)}. Nothing was loaded"
        )
    if prefix is None:
        prefixes = {match.group() if (match := _PREFIX.match(name)) else "" for name in found}
        if len(prefixes) > 1:
            raise ValueError(
                f"{source} has adapters for several models, with the prefixes {some(sorted(map(repr, prefixes)))}: say "
                "which is this one's, with prefix=. Nothing was loaded"
            )
        prefix = next(iter(prefixes), "")
    own = {name.removeprefix(prefix): parts for name, parts in found.items() if name.startswith(prefix)}
    if not own:
        raise ValueError(f"{source} has no adapter whose name begins with {prefix!r}. Nothing was loaded")
    lacking = [
        f"{name}.{part}"
        for name, parts in own.items()
        for part in ("lora_down", "lora_up")
        if f"{part}.weight" not in parts
    ]
    if lacking:
        raise ValueError(f"{source} lacks {some(lacking)}; nothing was loaded")
    return own, [name for name in found if not name.startswith(prefix)]


def _real_names(modules: Mapping[str, nn.Module], written: Mapping[str, Parts], source: str) -> dict[str, str]:
    """Return the name of the module that each name with underscores stands for. Raises ValueError where there is none,
    or are two."""
    real: dict[str, list[str]] = {}
    for name in modules:
        real.setdefault(name.replace(".", "_"), []).append(name)
    absent = [name for name in written if name not in real]
    if absent:
        raise ValueError(
            f"{source}: the model has no place for {some(absent)}. Is another prefix= this model's? If these are the "
            "names of the original Stable Diffusion or Flux, lora_state_dict of the pipeline's class in diffusers "
            "converts the file, and load_diffusers takes what it returns. Nothing was loaded"
        )
    double = [f"{name} ({some(real[name])})" for name in written if len(real[name]) > 1]
    if double:
        raise ValueError(f"{source}: these names stand for two modules each: {some(double)}. Nothing was loaded")
    return {name: real[name][0] for name in written}


def _parts(parts: Parts, module: Any, name: str, source: str) -> Parts:
    """Return A and B in PEFT's layout for `module`. Raises ValueError for tensors that are not those of an adapter."""
    a, b, t = parts["lora_down.weight"], parts["lora_up.weight"], parts.get("lora_mid.weight")
    if t is not None:
        r = a.shape[0]
        if not (t.is_floating_point() and a.ndim == t.ndim > 2 and t.shape[:2] == (r, r) and a.shape[2:].numel() == 1):
            raise ValueError(
                f"{source}: {name}.lora_mid {tuple(t.shape)} and lora_down {tuple(a.shape)} should be [r, r, k...] and "
                "[r, C, 1...]; nothing was loaded"
            )
        a = torch.einsum("pq...,qc->pc...", t.double(), a.flatten(1).double()).to(a.dtype)
    a, b = fitted(a, b, module)
    converted = {"lora_A.weight": a, "lora_B.weight": b}
    check_values(converted, name, source)
    return converted
