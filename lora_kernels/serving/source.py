"""The adapters that a pool is given: a folder in PEFT's format, or a state dict with its config, checked against the
layers of the pool before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels.core.many import panel_stride
from lora_kernels.models.adapter_config import CONFIG, AdapterConfig, checked_config, read_config
from lora_kernels.models.adapter_files import (
    PEFT_KEY,
    WEIGHTS,
    LayerAdapter,
    adapters_of,
    one_save,
    read_header,
    read_weights,
)
from lora_kernels.models.targets import matches, some
from lora_kernels.nn.settings import scaling_of

AdapterSource = str | os.PathLike[str] | Mapping[str, Tensor]
"""A folder in PEFT's format, or a state dict under PEFT's names."""

Values = dict[str, LayerAdapter]
"""A and B by the name of the layer."""


@dataclass(frozen=True)
class Place:
    """What an adapter must fit in one layer of the pool."""

    K: int
    N: int
    dtype: torch.dtype
    """The dtype in which its adapters are served."""

    def nbytes(self, R: int) -> int:
        """Return the bytes that an adapter of rank R takes on the device."""
        return R * (panel_stride(self.K, self.dtype) + panel_stride(self.N, self.dtype)) * self.dtype.itemsize


@dataclass(frozen=True)
class Targets:
    """The layers of a pool, against which adapters are checked."""

    places: Mapping[str, Place]
    """By plain name."""
    passed_over: Mapping[str, str]
    """Why the pool does not serve another layer that looks linear."""
    names: frozenset[str]
    """The plain names of all modules of the model."""


@dataclass(frozen=True)
class Source:
    """An adapter that fits the pool, and where its values come from."""

    label: str
    """The folder, or another source, as errors name it."""
    scales: Mapping[str, float]
    """s of each layer that the adapter changes."""
    ranks: Mapping[str, int]
    """R of each of these layers."""
    nbytes: int
    """The bytes that it takes on the device."""
    passed_over: Mapping[str, str]
    """Why the pool does not serve another layer that the adapter has, for each of these."""
    missing: tuple[str, ...]
    """The layers that the config names, and for which there are no values."""
    config: AdapterConfig
    directory: Path | None = None
    """The folder, or None where the values were given."""
    stamp: tuple[tuple[int, int, int], ...] = ()
    """Which files they were when they were checked: the inode, size and time of each."""
    disk_bytes: int = 0

    def read(self) -> Values:
        """Return the values from the folder. Raises ValueError or FileNotFoundError where the files are no longer those
        that were checked."""
        assert self.directory is not None
        with one_save(self.directory):
            if _stamp(self.directory) != self.stamp:
                raise ValueError(
                    f"{self.directory} was changed since it was registered: pool.update(name, directory) makes it "
                    "another version"
                )
            tensors = read_weights(self.directory / WEIGHTS)
        found = adapters_of(tensors, PEFT_KEY, False, self.label, self.ranks.keys()).linear()
        return {name: found[name] for name in self.ranks}


def opened(name: str, source: AdapterSource, config: Any, targets: Targets) -> tuple[Source, Values | None]:
    """Return the adapter `name`, checked, and its values where they were given. Raises ValueError, TypeError or
    FileNotFoundError where it cannot be served."""
    if isinstance(source, (str, os.PathLike)):
        if config is not None:
            raise ValueError(f"{os.fspath(source)!r} has a config of its own: pass config for a state dict only")
        return of_directory(source, targets), None
    if not isinstance(source, Mapping):
        raise TypeError(f"an adapter is a folder or a state dict, got a {type(source).__name__}")
    if config is None:
        raise ValueError(
            f"the state dict of {name!r} needs its settings: config=LoraConfig(...), or a dictionary of its fields, "
            "such as dict(r=8, lora_alpha=16)"
        )
    return of_state_dict(source, config, f"the state dict of {name!r}", targets)


def of_directory(directory: str | os.PathLike[str], targets: Targets) -> Source:
    """Return the adapter in a folder, of which the config and the header of the weights are read. Raises ValueError or
    FileNotFoundError where it cannot be served."""
    directory = Path(directory)
    if not directory.is_dir():
        read_config(directory / CONFIG)  # which raises the error
    with one_save(directory):
        config, header = read_config(directory / CONFIG), read_header(directory / WEIGHTS)
        stamp = _stamp(directory)
    disk_bytes = sum(size for _, size, _ in stamp)
    return _checked(config, header, str(directory), targets, directory, stamp, disk_bytes)[0]


def of_state_dict(tensors: Mapping[str, Tensor], config: Any, label: str, targets: Targets) -> tuple[Source, Values]:
    """Return the adapter that a state dict under PEFT's names holds, and its values. `config` holds the fields of
    LoraConfig, or is an `AdapterConfig`. Raises ValueError or TypeError where it cannot be served."""
    if not isinstance(config, AdapterConfig):
        fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        plain = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in fields.items()}
        kind = plain.get("peft_type", "LORA")
        config = checked_config(plain | {"peft_type": getattr(kind, "value", kind)}, label)
    wrong = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(f"{label}: these values are no tensors: {some(wrong)}")
    return _checked(config, tensors, label, targets)


def _checked(
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    label: str,
    targets: Targets,
    directory: Path | None = None,
    stamp: tuple[tuple[int, int, int], ...] = (),
    disk_bytes: int = 0,
) -> tuple[Source, Values]:
    """Return the adapter, checked against `targets`, and the tensors of the layers that it changes."""
    settings = config.settings
    if settings.use_dora:
        raise ValueError(
            f"{label} is a DoRA adapter, whose update depends on W: merge it, or serve it with PEFT and "
            "lora_kernels.fuse"
        )
    config = config.for_names(targets.names, label)
    if config.rules.target_parameters:
        raise ValueError(
            f"{label} adapts parameters of experts (target_parameters), and a pool serves linear layers only"
        )
    stored = adapters_of(tensors, PEFT_KEY, False, label, targets.names).linear()
    fitting = {name: each for name, each in stored.items() if name in targets.places}
    passed_over = {
        name: targets.passed_over.get(name, "the model has no such layer") for name in stored if name not in fitting
    }
    if not fitting:
        raise ValueError(
            f"{label} matches no layer of this model. It has adapters for {some(sorted(stored))}; the pool "
            f"serves {some(sorted(targets.places))}"
        )
    scales, ranks, nbytes = {}, {}, 0
    for name, (a, b) in fitting.items():
        place, R = targets.places[name], config.rank(name)
        if (tuple(a.shape), tuple(b.shape)) != ((R, place.K), (place.N, R)):
            raise ValueError(
                f"{label}: {name}.lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} should be {(R, place.K)} and "
                f"{(place.N, R)}, by the layer of this model and by r or rank_pattern in its config: another base, or "
                "files of two adapters"
            )
        scales[name], ranks[name] = scaling_of(config.alpha(name), R, settings.use_rslora), R
        nbytes += place.nbytes(R)
    source = Source(
        label,
        scales,
        ranks,
        nbytes,
        passed_over,
        _missing(config, fitting, targets),
        config,
        directory,
        stamp,
        disk_bytes,
    )
    return source, fitting


def _missing(config: AdapterConfig, fitting: Values, targets: Targets) -> tuple[str, ...]:
    """Return the layers of the pool that the config names and the adapter has no values for."""
    rules = config.rules
    wanted, excluded = rules.target_modules, rules.exclude_modules or ()
    if not wanted or rules.layers_to_transform is not None or (isinstance(wanted, str) and wanted == "all-linear"):
        return ()
    names = wanted if isinstance(wanted, str) else frozenset(wanted)
    without = excluded if isinstance(excluded, str) else frozenset(excluded)
    return tuple(
        name for name in targets.places if name not in fitting and matches(names, name) and not matches(without, name)
    )


def _stamp(directory: Path) -> tuple[tuple[int, int, int], ...]:
    status = [(directory / name).stat() for name in (CONFIG, WEIGHTS)]
    return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in status)
