"""PEFT's ``adapter_config.json``: a reader that checks every field, and the fields to write."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_kernels.core import atomic
from lora_kernels.models import patterns
from lora_kernels.models.names import bare, plain_names, plain_rules
from lora_kernels.models.targets import Rules, by_pattern, expressions_of, is_literal, matches, some
from lora_kernels.models.ties import are_tied
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.conv1d import FusedLoRAConv1D
from lora_kernels.nn.settings import LoRASettings

CONFIG = "adapter_config.json"
"""The name of the file."""

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (True, False),  # PEFT corrects it by the class of the layer, but not for an attention's out_proj
    "bias": ("none",),
    "modules_to_save": (None, []),
    # These schemes set A and B only. The others (pissa, olora, loftq, corda, lora_ga) change the base as well.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "layer_replication": (None, []),
    "lora_bias": (False,),
    "use_bdlora": (None, False),
    "arrow_config": (None, {}),
    "megatron_config": (None, {}),
    "kasa_config": (None,),  # scales the rank's dimensions, and cuts the smallest singular values off the base
    "velora_config": (None,),  # approximates the gradients
    "monteclora_config": (None,),  # adds noise in training
    "enable_lora": (None,),  # of the first PEFT: loralib's MergedLinear
}
"""The values of LoraConfig's fields that are supported: the adapter is A and B (and m) beside an unchanged
``nn.Linear``."""

_USED = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "target_parameters",
    "ensure_weight_tying",
}  # fmt: skip
"""The fields that `read_config` uses."""
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "merge_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
}  # fmt: skip
"""The fields that change nothing here. They are notes, settings of features that `_SUPPORTED` excludes, or settings of
training beside the layer (the last three are of ms-swift)."""


@dataclass(frozen=True)
class AdapterConfig:
    """A config that was read, in the form that `apply_lora` passes on."""

    settings: LoRASettings
    """The settings of every layer, but for the patterns in `rules`."""
    rules: Rules
    """The rules that choose the layers, with rank_pattern and alpha_pattern."""
    of_peft: bool = False
    """Whether PEFT has written the file. Its configs have fields that ours have not."""

    def for_names(self, names: Collection[str], source: Path | str) -> AdapterConfig:
        """Return the config for a model with these plain names: its rules without the names of wrappers, and checked to
        be regular expressions that are matched with these names in bounded time. Raises ValueError otherwise, which
        names `source`."""
        rules, plain = self.rules, plain_rules(names)
        wanted, excluded = rules.target_modules, rules.exclude_modules or ()
        own = Rules(
            plain(wanted) if isinstance(wanted, str) else [plain(each) for each in wanted],
            plain(excluded) if isinstance(excluded, str) else [plain(each) for each in excluded],
            {plain(key): r for key, r in (rules.rank_pattern or {}).items()},
            {plain(key): alpha for key, alpha in (rules.alpha_pattern or {}).items()},
            rules.layers_to_transform,
            rules.layers_pattern,
            [plain(each) for each in rules.target_parameters or ()],
            rules.ensure_weight_tying,
        )
        for field, expressions in expressions_of(own).items():
            try:
                patterns.check(expressions, names)
            except ValueError as error:
                way_out = "; name the layers instead, or load it with PEFT if you trust the file" * isinstance(
                    error, patterns.TooSlow
                )
                raise ValueError(f"{source}: {field}: {error}{way_out}. Nothing was loaded") from None
        return replace(self, rules=own)

    def rank(self, name: str) -> int:
        """Return r of the layer `name`."""
        r: int = by_pattern(self.rules.rank_pattern, name, self.settings.r)
        return r

    def alpha(self, name: str) -> float:
        """Return lora_alpha of the layer `name`."""
        alpha: float = by_pattern(self.rules.alpha_pattern, name, self.settings.lora_alpha)
        return alpha


def read_config(path: Path) -> AdapterConfig:
    """Return the config in the file `path`, checked, but for its regular expressions: see `AdapterConfig.for_names`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short or not JSON; it is not a config of LoRA; a field has a value that LoraConfig
            does not allow, or asks for something that is not computed here; a field is not known here and is not off
            (false, null, 0 or empty), because it may change what is computed.
    """
    return checked_config(read_fields(path), path)


def read_fields(path: Path) -> Any:
    """Return what the file `path` holds as JSON. Raises what `read_config` raises for a file that is not there, or is
    not JSON."""
    try:
        return json.loads(atomic.contents(path), object_pairs_hook=_without_doubles)
    except (FileNotFoundError, NotADirectoryError):
        what = "a file, and must be" if path.parent.is_file() else "not"
        more = f": {path.parent} is {what} the directory of an adapter" if path.parent.exists() else ""
        raise FileNotFoundError(f"there is no {path}{more}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut short or not JSON ({error}); nothing was loaded") from error


def checked_config(config: Any, path: Path | str) -> AdapterConfig:
    """Return the config that these fields of LoraConfig make, as `read_config` does. `path` says in errors where they
    come from. Raises ValueError as `read_config` does."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: peft_type is {kind!r:.200}; only 'LORA' is supported. {_way_out(None)}")
    bad = [f"{k}={config[k]!r:.200}" for k, ok in _SUPPORTED.items() if k in config and config[k] not in ok]
    if bad:
        raise ValueError(f"{path}: not supported: {', '.join(bad)}. {_way_out(config.get('init_lora_weights'))}")
    unknown = [k for k, v in config.items() if v and k not in _SUPPORTED.keys() | _USED | _WITHOUT_EFFECT]
    if unknown:
        raise ValueError(
            f"{path}: not known here, and may change what is computed: "
            f"{some([f'{k:.100}={config[k]!r:.100}' for k in sorted(unknown)])}. Load it with a PEFT that knows this, "
            "then lora_kernels.fuse(model); or remove it from the file, if it says nothing about A and B. Nothing was "
            "loaded"
        )
    _check_types(config, path)
    _check_numbers(config, path)
    return AdapterConfig(
        LoRASettings(
            r=config.get("r", 8),
            lora_alpha=config.get("lora_alpha", 8),
            lora_dropout=config.get("lora_dropout", 0.0),
            use_rslora=config.get("use_rslora", False),
            use_dora=config.get("use_dora", False),
        ),
        Rules(
            config.get("target_modules") or (),
            config.get("exclude_modules"),
            config.get("rank_pattern") or {},
            config.get("alpha_pattern") or {},
            config.get("layers_to_transform"),
            config.get("layers_pattern"),
            config.get("target_parameters") or (),
            config.get("ensure_weight_tying", False),
        ),
        "revision" in config or "peft_version" in config,
    )


def _way_out(init: Any) -> str:
    """Return what to do with the file of an adapter that `init` has initialised, and that is not supported."""
    if init == "relora":
        return (
            "The adapter was restarted (ReLoRA), and its earlier updates are in the base weights of its training, "
            "which the file does not hold: load the state_dict of the whole model"
        )
    if init not in _LOST_BASE:
        return "Load it with PEFT (PeftModel.from_pretrained), then lora_kernels.fuse(model)"
    return (
        "The adapter was trained over a changed base, which the file does not hold, and which PEFT does not make again "
        "from the original one. Save the adapter with PEFT's save_pretrained(..., "
        "path_initial_model_for_weight_conversion=...), which makes it an adapter of twice the rank over the original "
        "base; or, if this model has the changed base, set init_lora_weights to true in the file"
    )


_LOST_BASE = ("corda", "lora_ga")
"""The initialisations whose base depends on data, so that it cannot be computed from the original base."""

_TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "ensure_weight_tying": (bool,),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "target_modules": (list, str),
    "exclude_modules": (list, str, type(None)),
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": (list, str, type(None)),
    "target_parameters": (list, type(None)),
}


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises ValueError for a name that stands in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice!r:.100} stands twice in one object")
    return found


def _check_types(config: dict[str, Any], path: Path | str) -> None:
    """Raise ValueError for a field whose value, or a value inside it, has another type than in LoraConfig."""
    for key, types in _TYPES.items():
        value = config.get(key, None if type(None) in types else types[0]())
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        inside = {"rank_pattern": (int,), "alpha_pattern": (int, float), "layers_to_transform": (int,)}.get(key, (str,))
        if key == "target_modules" and value is None and config.get("target_parameters"):
            continue
        # type() and not isinstance, because True is an int
        if type(value) not in types or not all(type(v) in inside for v in values):
            raise ValueError(f"{path}: {key}={value!r:.200} is not what LoraConfig has there")


def _check_numbers(config: dict[str, Any], path: Path | str) -> None:
    """Raise ValueError for an r, an alpha or a dropout that no layer can have."""
    r, alpha, dropout = config.get("r", 8), config.get("lora_alpha", 8), config.get("lora_dropout", 0.0)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for one in {(r, alpha), *((each, alpha) for each in ranks.values()), *((r, each) for each in alphas.values())}:
        try:
            LoRASettings(*one, dropout).check()
            if one[0] >= 1 << 31:
                raise ValueError(f"r is {one[0]}")
        except (ValueError, OverflowError) as error:  # an integer may be too large for a float
            raise ValueError(f"{path}: {error}") from None


def config_of(model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, Any]:
    """Return the fields of LoraConfig that a reader of these layers' adapters needs. The others keep PEFT's defaults.
    Raises ValueError where layers differ in use_rslora or use_dora, because a config has one value of each, and where a
    layer's settings are such that no reader would take them."""
    for name, layer in layers.items():
        for key in ("r", "lora_alpha", "lora_dropout"):
            value = getattr(layer, key)
            if isinstance(value, bool) or not isinstance(value, _TYPES[key]):
                raise ValueError(f"{name}: {key} is {value!r:.100}, a {type(value).__name__}; nothing was saved")
        try:
            LoRASettings(layer.r, layer.lora_alpha, layer.lora_dropout).check()
        except ValueError as error:
            raise ValueError(f"{name}: {error}; nothing was saved") from None
    for setting in ("use_rslora", "use_dora"):
        having = [name for name, layer in layers.items() if getattr(layer, setting)]
        if having and len(having) < len(layers):
            raise ValueError(f"only some layers have {setting} ({some(having)}): PEFT's format has one setting for all")
    first = next(iter(layers.values()))
    # Jobs give the settings of linear layers in the place of layers, and these have no target_parameters.
    adapted = {name: getattr(layer, "target_parameters", ()) for name, layer in layers.items()}
    named = {name: layer for name, layer in layers.items() if not adapted[name]}
    parameters = {f"{name}.{key}": layers[name] for name, keys in adapted.items() for key in keys}
    ranks = {name: layer.r for name, layer in (named | parameters).items()}
    alphas = {name: layer.lora_alpha for name, layer in (named | parameters).items()}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        **notes_of(model),
        "r": r,
        "lora_alpha": alpha,
        # PEFT refuses dropout beside target_parameters, also for a model that is not trained.
        "lora_dropout": 0.0 if parameters else max(layer.lora_dropout for layer in layers.values()),
        "use_rslora": first.use_rslora,
        "target_modules": target_of(model, named),
        "target_parameters": sorted(parameters) or None,
        "ensure_weight_tying": are_tied(layers),
        "rank_pattern": pattern_for(ranks, r),
        "alpha_pattern": pattern_for(alphas, alpha),
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer, FusedLoRAConv1D) for layer in layers.values()),
        "init_lora_weights": True,
        "use_dora": first.use_dora,
        "lora_bias": False,
        "modules_to_save": None,
    }


def notes_of(model: nn.Module) -> dict[str, Any]:
    """Return the fields of PEFT's configs that tell what the adapter belongs to."""
    kind = type(bare(model))
    return {
        "task_type": _task_of(bare(model)),
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": str(getattr(model, "name_or_path", None) or "") or None,
        "inference_mode": True,
    }


def _task_of(model: nn.Module) -> str | None:
    """Return PEFT's name for the task of a model of transformers, or None where it is not sure, or where PEFT would
    expect a head in the file (classification, question answering)."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or getattr(model, "main_input_name", None) != "input_ids":
        return None
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return None


def target_of(model: nn.Module, names: Collection[str]) -> list[str] | str:
    """Return the target_modules that choose the layers with these names in `model`, and no others.

    PEFT matches the names in a list with the ends of modules' names too. So a list is exact only if no other module's
    name ends in one of them; else it is a regular expression.
    """
    listed = sorted(names)
    exact = not any(name not in names and matches(listed, name) for name, _, _ in plain_names(model))
    return listed if exact else "|".join(map(re.escape, listed))


def pattern_for(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Return a rank_pattern or alpha_pattern for `values` by layer. Its keys are plain names if these match the right
    layers only, and otherwise regular expressions for whole names."""
    # The first key that matches counts. The file's keys are sorted, so the test must try them in that order.
    plain = {name: value for name, value in sorted(values.items()) if value != default}
    if all(map(is_literal, plain)) and all(by_pattern(plain, name, default) == value for name, value in values.items()):
        return plain
    return {"^" + re.escape(name): value for name, value in plain.items()}
