"""An adapter on disk in PEFT's format, read without its model, changed and written again."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels.core import atomic
from lora_kernels.models.adapter_config import CONFIG, AdapterConfig, checked_config, pattern_for, read_fields
from lora_kernels.models.adapter_files import (
    MAGNITUDE,
    PEFT_KEY,
    WEIGHTS,
    Parts,
    adapters_of,
    one_save,
    pairs,
    read_weights,
    safetensors_torch,
    shown,
)
from lora_kernels.models.targets import matches, some
from lora_kernels.nn.settings import scaling_of

_PREFIX = "base_model.model."
_BESIDE = ("modules_to_save", "bias", "trainable_token_indices", "lora_bias", "alora_invocation_tokens")
"""Fields of a config that add tensors beside A and B, or say for which tokens they count. What A and B are does not
depend on them."""


@dataclass(frozen=True)
class StoredUpdate:
    """One low-rank update s·B A of a layer, or a stack of E updates where the layer holds E experts."""

    part: str
    """The part of the file's key that names A, such as "lora_A.weight"."""
    other: str
    """The part that names B."""
    a: Tensor
    """A [E, r, K] in the file's dtype. That of a convolution is flattened to K = C·k..., and E is 1 but for experts."""
    b: Tensor
    """B [E, N, r] in the file's dtype."""
    scale: float
    """s."""
    tails: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """The sizes that follow [r, C] and [N, r] in the file, for a convolution."""
    stacked: bool = False
    """Whether the file holds a stack of experts."""

    def parts(self, a: Tensor, b: Tensor) -> Parts:
        """Return another A [E, r, K] and B [E, N, r] for this layer in the layout of the file."""
        r = a.shape[1]
        if self.stacked:
            return {self.part: a.flatten(0, 1), self.other: b.permute(1, 2, 0).flatten(1)}
        first, last = self.tails
        return {self.part: a[0].reshape(r, -1, *first), self.other: b[0].reshape(-1, r, *last)}


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter that was read from its directory."""

    source: str
    """The directory, as errors name it."""
    fields: dict[str, Any]
    """The fields of its config as they stand in the file."""
    config: AdapterConfig
    """The same fields, checked."""
    layers: dict[str, list[StoredUpdate]]
    """The updates of each layer by its plain name. They share one rank. Experts have one for each parameter, and an
    nn.MultiheadAttention has one for each projection; every other layer has one."""
    others: dict[str, Tensor] = field(default_factory=dict)
    """The other tensors of the file by their keys: magnitudes of DoRA, and what is trained beside the adapter."""

    def rank(self, name: str) -> int:
        """Return r of the layer `name`."""
        return self.layers[name][0].a.shape[1]

    def alpha(self, name: str) -> float:
        """Return lora_alpha of the layer `name`."""
        return self.config.alpha(_names_in_patterns(name, self.config)[0])


def read_stored(directory: str | os.PathLike[str], to_write: bool = True) -> StoredAdapter:
    """Return the adapter in `directory`. With ``to_write=False`` it is only looked at: a tie with a head, an
    initialisation that changed the base and a convolution with groups are then read too, whose B becomes [N, r] with a
    block for each group.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged; the config has something that is not computed here; the two files do not fit
            together; a convolution has groups, so that its B is no matrix [N, r]; a head shares the adapter of an
            embedding.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}, or it is no directory of an adapter")
    with one_save(directory):
        fields = read_fields(directory / CONFIG)
        if isinstance(fields, dict) and (kind := fields.get("peft_type", "LORA")) != "LORA":
            raise ValueError(
                f"{directory / CONFIG}: peft_type is {kind!r:.200}, and only the updates of 'LORA' are read. Merge the "
                "adapter into its model with merge_and_unload(), and extract_lora(merged, base, ...) makes LoRA of it"
            )
        tensors = read_weights(directory / WEIGHTS)
    beside = _BESIDE if to_write else (*_BESIDE, "init_lora_weights")
    known = {k: v for k, v in fields.items() if k not in beside} if isinstance(fields, dict) else fields
    config = checked_config(known, directory / CONFIG)
    if config.rules.ensure_weight_tying and to_write:
        raise ValueError(
            f"{directory}: ensure_weight_tying is set, so a head shares the adapter of an embedding, and the two would "
            "not stay equal. Train or save the adapter without the tie"
        )
    own = {key: value for key, value in tensors.items() if PEFT_KEY.fullmatch(key)}
    others = {key: value for key, value in tensors.items() if key not in own}
    if odd := sorted(key for key in others if "lora_" in key and not key.endswith("lora_B.bias")):
        raise ValueError(f"{directory / WEIGHTS} has keys that are not known here: {some(odd)}")
    stored = adapters_of(own, PEFT_KEY, config.settings.use_dora, str(directory / WEIGHTS), ())
    names = [each for name in stored.layers for each in _names_in_patterns(name, config)]
    config = config.for_names(names, directory / CONFIG)
    layers = {name: _updates(name, parts, config, directory, to_write) for name, parts in stored.layers.items()}
    others |= {f"{_PREFIX}{n}.{MAGNITUDE}": p[MAGNITUDE] for n, p in stored.layers.items() if MAGNITUDE in p}
    if any(key not in own for key in _keys(stored.layers)):  # the file was written from a wrapped model
        fields |= exact_rules(list(layers))
    return StoredAdapter(str(directory), fields, config, layers, others)


def write_stored(
    directory: str | os.PathLike[str],
    fields: Mapping[str, Any],
    parts: Mapping[str, Parts],
    others: Parts | None = None,
) -> None:
    """Write an adapter: the parts of each layer, and `others` under their own keys. Both files are replaced together or
    not at all. Raises OSError where they cannot be written."""
    tensors = {f"{_PREFIX}{name}.{part}": value for name, own in parts.items() for part, value in own.items()}
    tensors |= others or {}
    weights = safetensors_torch().save(
        {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()},
        metadata={"format": "pt"},
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(dict(fields), indent=2, sort_keys=True).encode()
    atomic.replace({directory / WEIGHTS: weights, directory / CONFIG: config})


def rank_fields(
    ranks: Mapping[str, int], alphas: Mapping[str, float], config: AdapterConfig | None = None
) -> dict[str, Any]:
    """Return the fields r, lora_alpha, rank_pattern and alpha_pattern that give each layer its rank and alpha.
    `config` has the rules by which PEFT finds the parameters of experts."""
    by_key = {key: name for name in ranks for key in (_names_in_patterns(name, config) if config else [name])}
    own_ranks = {key: ranks[name] for key, name in by_key.items()}
    own_alphas = {key: _whole(alphas[name]) for key, name in by_key.items()}
    r, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (own_ranks, own_alphas))
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": pattern_for(own_ranks, r),
        "alpha_pattern": pattern_for(own_alphas, alpha),
    }


def exact_rules(names: list[str]) -> dict[str, Any]:
    """Return the fields that choose exactly these layers in every model."""
    return {
        "target_modules": "|".join(map(re.escape, sorted(names))),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _keys(layers: Mapping[str, Parts]) -> list[str]:
    return [f"{_PREFIX}{name}.{part}" for name, parts in layers.items() for part in parts if part != MAGNITUDE]


def _names_in_patterns(name: str, config: AdapterConfig) -> list[str]:
    """Return the names by which rank_pattern and alpha_pattern choose for a layer: its own, or those of its parameters
    that target_parameters name."""
    named = [each.rpartition(".") for each in config.rules.target_parameters or ()]
    return [f"{name}.{parameter}" for module, _, parameter in named if matches([module], name)] or [name]


def _updates(name: str, parts: Parts, config: AdapterConfig, directory: Path, to_write: bool) -> list[StoredUpdate]:
    """Return the updates of a layer. Raises ValueError where they do not have the rank of the config."""
    key = _names_in_patterns(name, config)[0]
    r, experts = config.rank(key), key != name
    scale = scaling_of(config.alpha(key), r, config.settings.use_rslora)
    updates = []
    for first, second in pairs(parts):
        a, b = parts[first], parts[second]
        if a.shape[0] != b.shape[1] and not to_write:
            b = torch.block_diag(*b.flatten(1).chunk(a.shape[0] // b.shape[1])).view(-1, a.shape[0], *b.shape[2:])
        if a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{directory}: {name}.{shown(first)} {tuple(a.shape)} and {shown(second)} {tuple(b.shape)} are of a "
                "convolution with groups, whose update is no product of two matrices. It has no truncated form that "
                "PEFT would read; nothing was written"
            )
        if a.shape[0] != r and not (experts and a.shape[0] % r == 0):
            raise ValueError(
                f"{directory}: {name}.{shown(first)} is {tuple(a.shape)}, but r (or rank_pattern) in {CONFIG} is {r}: "
                "the two files are not of one adapter; nothing was written"
            )
        if experts and a.ndim == 2:
            E = a.shape[0] // r
            a, b = a.view(E, r, -1), b.view(-1, r, E).permute(2, 0, 1)
            updates.append(StoredUpdate(first, second, a, b, scale, stacked=True))
        else:
            tails = tuple(a.shape[2:]), tuple(b.shape[2:])
            updates.append(StoredUpdate(first, second, a.flatten(1)[None], b.flatten(1)[None], scale, tails))
    return updates
