"""The two files of an adapter in PEFT's format, read with suspicion and written atomically. Nothing is unpickled."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_kernels.models.targets import by_pattern, matches, some
from lora_kernels.nn.linear import FusedLoRALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

MAGNITUDE = "magnitude_vector"
# The magnitude's key ends here: in the PEFT that brought DoRA it was a parameter, not yet a module with a weight.
PEFT_KEY = re.compile(rf"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB](?=\.weight)|{MAGNITUDE}$)(\.weight)?")
LORALIB_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])")

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "modules_to_save": (None, []),
    # These begin with other values of A and B. The rest (pissa, olora, loftq, corda, lora_ga) change the base as well.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "layer_replication": (None, []),
    "lora_bias": (False,),
    "target_parameters": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None, {}),
    "megatron_config": (None, {}),
    "ensure_weight_tying": (False,),
}
"""The values of LoraConfig's fields with which an adapter is A and B (and m) beside an unchanged ``nn.Linear``."""

_SETTINGS = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
}  # fmt: skip
_OF_NO_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
}  # fmt: skip


class Adapter(NamedTuple):
    """What the files hold of one layer."""

    a: Tensor
    """[r, in]"""
    b: Tensor
    """[out, r]"""
    m: Tensor | None = None
    """[out], with DoRA."""


Adapters = dict[str, Adapter]
"""By the layer's name."""


def safetensors_torch() -> Any:
    """The module safetensors.torch. Raises ImportError that says how to get it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapters on disk need safetensors: pip install lora_kernels[adapters]") from error
    return safetensors.torch


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises FileNotFoundError, or ValueError for a broken file."""
    st = safetensors_torch()
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        more = f" ({pickled.name} is a pickle and is not read: save it anew as safetensors)" if pickled.exists() else ""
        raise FileNotFoundError(f"there is no {path}{more}")
    try:
        # Read whole, not mapped: a file that changes later changes nothing here.
        return st.load(path.read_bytes())
    except Exception as error:  # SafetensorError, and a few others for a broken header
        raise ValueError(f"{path} is cut short or not a safetensors file ({error}); nothing was loaded") from error


def read_config(path: Path) -> dict[str, Any]:
    """A config that was checked: every field as in LoraConfig, none of them with a meaning not supported here."""
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        more = f": {path.parent} is a file, and must be the directory of an adapter" if path.parent.is_file() else ""
        raise FileNotFoundError(f"there is no {path}{more}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut short or not JSON ({error}); nothing was loaded") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: peft_type is {kind!r}; only 'LORA' is supported")
    bad = [f"{k}={config[k]!r}" for k, allowed in _SUPPORTED.items() if k in config and config[k] not in allowed]
    if bad:
        raise ValueError(
            f"{path}: not supported: {', '.join(bad)}. Load it with PEFT (PeftModel.from_pretrained), then "
            "lora_kernels.fuse(model)"
        )
    kinds: dict[str, tuple[type, ...]] = {
        "r": (int,),
        "lora_alpha": (int, float),
        "lora_dropout": (int, float),
        "use_rslora": (bool,),
        "use_dora": (bool,),
        "rank_pattern": (dict, type(None)),
        "alpha_pattern": (dict, type(None)),
        "target_modules": (list, str),
        "exclude_modules": (list, str, type(None)),
        "layers_to_transform": (list, int, type(None)),
        "layers_pattern": (list, str, type(None)),
    }
    elements = {"layers_to_transform": (int,)}  # of a list; else names
    for key, types in kinds.items():
        value = config.get(key, None if type(None) in types else types[0]())
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        inside = (int, float) if isinstance(value, dict) else elements.get(key, (str,))
        if not isinstance(value, types) or not all(isinstance(v, inside) for v in values):
            raise ValueError(f"{path}: {key}={value!r} is not what LoraConfig has there")
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"):
        value = config.get(key)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{path}: {key}: {pattern!r} is no regular expression ({error})") from None
    unknown = sorted(k for k, v in config.items() if v and k not in _SUPPORTED.keys() | _SETTINGS | _OF_NO_EFFECT)
    if unknown:
        warnings.warn(f"{path}: fields of a newer PEFT, not known here, are ignored: {some(unknown)}", stacklevel=3)
    return config


def adapters_of(state: Mapping[str, Tensor], key: re.Pattern[str], dora: bool, source: str) -> Adapters:
    """A, B and with `dora` m by layer. Raises ValueError for keys that `key` does not match, layers of which a part is
    missing or too many, shapes that are none of an adapter's."""
    found: dict[str, dict[str, Tensor]] = {}
    surplus = []
    for k, tensor in sorted(state.items()):  # a file's order is not the same in every process
        match = key.fullmatch(k)
        if match:
            found.setdefault(match["layer"], {})[match["part"]] = tensor
        else:
            surplus.append(k)
    if surplus:
        known = f"lora_A, lora_B or lora_{MAGNITUDE}" if dora else "lora_A or lora_B"
        raise ValueError(f"{source} has keys that are no {known}: {some(surplus)}; nothing was loaded")
    wanted = ("A", "B", MAGNITUDE) if dora else ("A", "B")
    missing = [f"{name}.lora_{part}" for name, parts in found.items() for part in wanted if part not in parts]
    if missing:
        raise ValueError(f"{source} lacks {some(missing)}; nothing was loaded")
    beside = [f"{name}.lora_{part}" for name, parts in found.items() for part in parts if part not in wanted]
    if beside:
        raise ValueError(
            f"{source} has {some(beside)}, but use_dora in {CONFIG} is false: the two files are not of one adapter. "
            "Nothing was loaded"
        )
    if not found:
        raise ValueError(f"{source} holds no adapter")
    adapters = {name: Adapter(parts["A"], parts["B"], parts.get(MAGNITUDE)) for name, parts in found.items()}
    for name, (a, b, m) in adapters.items():
        if odd := [f"{t.dtype}" for t in (a, b, m) if t is not None and not t.is_floating_point()]:
            raise ValueError(f"{source}: the adapter of {name} is {odd[0]}, no floating type; nothing was loaded")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{source}: {name}.lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are not [r, in] and [out, r] "
                "(as of a convolution, or of loralib's MergedLinear); nothing was loaded"
            )
        if m is not None and m.shape != b.shape[:1]:
            raise ValueError(
                f"{source}: {name}.lora_{MAGNITUDE} {tuple(m.shape)} is not [out], a number for each row of lora_B "
                f"{tuple(b.shape)}; nothing was loaded"
            )
    return adapters


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and DistributedDataParallel, which would show in the names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def config_of(model: nn.Module, layers: dict[str, FusedLoRALinear]) -> dict[str, Any]:
    """The fields of LoraConfig that a reader needs; the others keep PEFT's defaults."""
    for setting in ("use_rslora", "use_dora"):
        having = [name for name, layer in layers.items() if getattr(layer, setting)]
        if having and len(having) < len(layers):
            raise ValueError(f"only some layers have {setting} ({some(having)}): PEFT's format has one setting for all")
    first = next(iter(layers.values()))
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha for name, layer in layers.items()}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    # PEFT takes a list's names as ends of names too, so a list is exact only if no other module ends like that.
    names = sorted(layers)
    exact = not any(name not in layers and matches(names, name) for name, _ in model.named_modules())
    target = names if exact else "|".join(map(re.escape, names))
    kind = type(model)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": max(layer.lora_dropout for layer in layers.values()),
        "use_rslora": first.use_rslora,
        "target_modules": target,
        "rank_pattern": _pattern(ranks, r),
        "alpha_pattern": _pattern(alphas, alpha),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": first.use_dora,
        "lora_bias": False,
        "modules_to_save": None,
    }


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """rank_pattern or alpha_pattern: plain names if they mean each layer and no other, else the anchored ones."""
    # in the order in which the file, and PEFT's own, will have them: the first key that matches counts
    plain = {name: value for name, value in sorted(values.items()) if value != default}
    literal = all(re.fullmatch(r"[\w.]+", name) for name in plain)
    if literal and all(by_pattern(plain, name, default) == value for name, value in values.items()):
        return plain
    return {"^" + re.escape(name): value for name, value in plain.items()}


def write_all(files: dict[Path, bytes]) -> None:
    """Replace all files, in this order, or on an error none."""
    suffix = f".{os.getpid()}.tmp"  # several processes may save at once
    new = {path: path.with_name(path.name + suffix) for path in files}
    old = {path: path.with_name(path.name + ".old" + suffix) for path in files if path.exists()}
    replaced: list[Path] = []
    try:
        for path, content in files.items():
            with open(new[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, kept in old.items():  # to put it back by; a copy, as not every file system has links
            shutil.copyfile(path, kept)
        for path in files:
            os.replace(new[path], path)
            replaced.append(path)
    except BaseException:
        for path in replaced:
            if path in old:
                os.replace(old[path], path)
            else:
                path.unlink()
        raise
    finally:
        for leftover in (*new.values(), *old.values()):
            leftover.unlink(missing_ok=True)
