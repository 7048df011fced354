"""The ``adapter_config.json`` of a model whose layers share A and B: PEFT's of VeRA, and one of Tied-LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lora_kernels.models.adapter_config import AdapterConfig
from lora_kernels.models.targets import Rules, some
from lora_kernels.nn.shared import SharedSettings


class Format(NamedTuple):
    """The names of a format's tensors."""

    factor: str
    """The name of A and of B, without its last letter."""
    u: str
    v: str


VERA, TIED = "VERA", "TIED_LORA"
FORMATS: Mapping[str, Format] = MappingProxyType(
    {VERA: Format("vera_", "vera_lambda_d", "vera_lambda_b"), TIED: Format("tied_", "tied_u", "tied_v")}
)
"""The formats by peft_type."""

_WITHOUT_EFFECT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "init_weights", "fan_in_fan_out", "runtime_config",
}  # fmt: skip
"""The fields that change nothing here. PEFT corrects fan_in_fan_out by the class of each layer."""
_TYPES: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "r": (int,),
        "vera_dropout": (int, float),
        "lora_alpha": (int, float),
        "lora_dropout": (int, float),
        "d_initial": (int, float),
        "projection_prng_key": (int,),
        "save_projection": (bool,),
        "target_modules": (list, str),
        "exclude_modules": (list, str, type(None)),
        "layers_to_transform": (list, int, type(None)),
        "layers_pattern": (list, str, type(None)),
        "train_a": (bool,),
        "train_b": (bool,),
        "train_u": (bool,),
        "train_v": (bool,),
    }
)
"""The fields that are read, and what they may be."""
_OFF: Mapping[str, tuple[Any, ...]] = MappingProxyType({"bias": ("none",), "modules_to_save": (None, [])})
TRAINED = ("train_a", "train_b", "train_u", "train_v")


@dataclass(frozen=True)
class SharedConfig:
    """A config of one of the formats, checked."""

    format: str
    settings: SharedSettings
    """The settings of every layer, without the factors."""
    rules: AdapterConfig
    """The rules that choose the layers, in the form that checks their regular expressions."""
    key: int | None
    """VeRA's projection_prng_key."""
    save_projection: bool
    train: Mapping[str, bool]
    """Whether A and B are trained, as keywords of `SharedFactors`."""


def checked(config: dict[str, Any], path: Path) -> SharedConfig:
    """Return the config that these fields make. Raises ValueError for a field with a value that it cannot have, or that
    asks for something that is not computed here."""
    kind = config["peft_type"]
    bad = [f"{k}={config[k]!r:.200}" for k, ok in _OFF.items() if k in config and config[k] not in ok]
    known = _TYPES.keys() | _WITHOUT_EFFECT | _OFF.keys()
    bad += sorted(f"{k:.100}={v!r:.100}" for k, v in config.items() if v and k not in known)
    if bad:
        raise ValueError(
            f"{path}: not supported, or not known here: {some(bad)}. Load it with PEFT "
            "(PeftModel.from_pretrained), then lora_kernels.fuse(model). Nothing was loaded"
        )
    for key, types in _TYPES.items():
        value = config.get(key)
        inside = int if key == "layers_to_transform" else str
        listed = value if isinstance(value, list) else []
        if key in config and (type(value) not in types or any(type(each) is not inside for each in listed)):
            raise ValueError(f"{path}: {key}={value!r:.200} is not what the config of {kind} has there")
    if not config.get("target_modules"):
        raise ValueError(f"{path}: it has no target_modules, which tell the layers. Nothing was loaded")
    r = config.get("r", 256)
    trained = {name: config.get(name, True) for name in TRAINED} if kind == TIED else {}
    if kind == VERA:
        alpha, dropout, first_u = r, config.get("vera_dropout", 0.0), config.get("d_initial", 0.1)
    else:
        alpha, dropout, first_u = config.get("lora_alpha", r), config.get("lora_dropout", 0.0), 1.0
    settings = SharedSettings(
        r, alpha, dropout, first_u=float(first_u),
        train_u=trained.get("train_u", True), train_v=trained.get("train_v", True),
    )  # fmt: skip
    try:
        settings.check()
        if r >= 1 << 31:
            raise ValueError(f"r is {r}")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None
    rules = Rules(
        config["target_modules"], config.get("exclude_modules"), {}, {},
        config.get("layers_to_transform"), config.get("layers_pattern"),
    )  # fmt: skip
    return SharedConfig(
        kind,
        settings,
        AdapterConfig(settings, rules),
        config.get("projection_prng_key", 0) if kind == VERA else None,
        config.get("save_projection", True),
        {name: trained.get(name, False) for name in ("train_a", "train_b")},
    )
