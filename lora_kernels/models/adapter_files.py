"""The tensors of an adapter on disk, under PEFT's or loralib's keys.

Tensors are checked when they are read. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.core import atomic, locks
from lora_kernels.models.adapter_config import CONFIG
from lora_kernels.models.names import WRAPPER, plain_name
from lora_kernels.models.targets import some

WEIGHTS = "adapter_model.safetensors"
"""The name of PEFT's file of tensors."""

MAGNITUDE = "lora_magnitude_vector"
# The magnitude's key has no ".weight": it was a parameter in the first PEFT with DoRA, and became a module later.
PEFT_KEY = re.compile(
    rf"({WRAPPER}\.)*base_model\.model\.(?P<layer>.+)\."
    rf"(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|{MAGNITUDE}(\.weight)?)"
)
LORALIB_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>lora_[AB])")

_OTHER = {
    "lora_A.weight": "lora_B.weight",
    "lora_B.weight": "lora_A.weight",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}
"""The part of a file that goes with each."""

Parts = dict[str, Tensor]
"""The tensors of a layer's adapter, by the part of their key in PEFT's file, as `AdapterLayer.file_parts` names it."""


class LayerAdapter(NamedTuple):
    """The adapter of one linear layer."""

    a: Tensor
    """A [r, in]."""
    b: Tensor
    """B [out, r]."""


class StoredAdapters(NamedTuple):
    """The adapters that a file holds."""

    source: str
    """The file, or another source, as errors name it."""
    layers: dict[str, Parts]
    """The adapters by layer name."""

    def linear(self) -> dict[str, LayerAdapter]:
        """Return A and B of each layer. Raises ValueError where the adapter of a layer is not that of a linear one."""
        other = [
            f"{name}.{shown(part)} {tuple(value.shape)}"
            for name, parts in self.layers.items()
            for part, value in parts.items()
            if part not in ("lora_A.weight", "lora_B.weight") or value.ndim != 2
        ]
        if other:
            raise ValueError(
                f"{self.source} has adapters of layers that are not linear, and only those of linear layers are served "
                f"here: {some(other)}"
            )
        return {
            name: LayerAdapter(parts["lora_A.weight"], parts["lora_B.weight"]) for name, parts in self.layers.items()
        }


def shown(part: str) -> str:
    """Return the part of a key as errors name it."""
    return part.removesuffix(".weight")


def pairs(parts: Parts) -> Iterator[tuple[str, str]]:
    """Yield the parts of a layer's A and of its B, for each pair that it has."""
    for part in parts:
        at = part.rindex("lora_")
        if part[at:] in ("lora_A.weight", "lora_embedding_A"):
            yield part, part[:at] + _OTHER[part[at:]]


def safetensors_torch() -> Any:
    """Return the module safetensors.torch. Raises ImportError, which says how to install it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapters on disk need safetensors: pip install lora_kernels[adapters]") from error
    return safetensors.torch


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a safetensors file. Raises FileNotFoundError, or ValueError for a broken file."""
    st = safetensors_torch()
    with _readable(path):
        with st.safe_open(path, "pt"):  # compares the header with the file's size before so many bytes are read
            pass
        # The file is read, not mapped into memory, so that a later change of it changes nothing here.
        return st.load(path.read_bytes())


def read_metadata(path: Path) -> dict[str, str]:
    """Return the notes in the header of a safetensors file. Raises FileNotFoundError, or ValueError for a broken
    file."""
    st = safetensors_torch()
    with _readable(path), st.safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the names, shapes and dtypes of the tensors of a safetensors file, as tensors on the meta device. Their
    values are not read. Raises FileNotFoundError, or ValueError for a broken file."""
    st = safetensors_torch()
    found = {}
    with _readable(path), st.safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no dictionary
            part = file.get_slice(name)
            shape = part.get_shape()
            dtype = part[:0].dtype if shape else file.get_tensor(name).dtype
            found[name] = torch.empty(shape, dtype=dtype, device="meta")
    return found


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise FileNotFoundError for a file that is not there, and ValueError for one that the body cannot read."""
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        more = f" ({pickled.name} is a pickle and is not read: save it anew as safetensors)" if pickled.exists() else ""
        raise FileNotFoundError(f"there is no {path}{more}")
    try:
        yield
    except Exception as error:  # a broken header raises several types beside SafetensorError
        raise ValueError(f"{path} is cut short or not a safetensors file ({error}); nothing was loaded") from error


@contextlib.contextmanager
def one_save(directory: Path) -> Iterator[None]:
    """Make sure that the files which the body reads from `directory` are of one save: one that was killed is finished
    first, and the next one waits. Raises ValueError where a killed save cannot be finished."""
    try:
        atomic.finish(directory)
    except OSError as error:
        raise ValueError(
            f"{directory}: a save was killed between its two files and cannot be finished ({error}). Call save_adapter "
            "again, or load_adapter where the directory may be written. Nothing was loaded"
        ) from error
    with locks.locked(directory, shared=True):
        yield


def adapters_of(
    state: Mapping[str, Tensor], key: re.Pattern[str], dora: bool, source: str, names: Collection[str]
) -> StoredAdapters:
    """Return the adapter of each layer, with `dora` also its magnitude, from tensors whose names the regular expression
    `key` matches. The layers have the names of the model, whose plain names are `names`, also where the file was
    written from a wrapped model.

    Raises ValueError for a name that `key` does not match, for a layer that lacks a part or has one too many or two
    times, and for shapes or dtypes that an adapter cannot have.
    """
    found: dict[str, Parts] = {}
    surplus, twice = [], []
    for k, tensor in sorted(state.items()):  # the order of a safetensors file differs between processes
        match = key.fullmatch(k)
        if match:
            layer, part = _divided(match["layer"], match["part"], names)
            if part in found.setdefault(layer, {}):
                twice.append(f"{layer}.{shown(part)}")
            found[layer][part] = tensor
        else:
            surplus.append(k)
    if twice:
        raise ValueError(
            f"{source} has two values for {some(twice)}, under two names, such as with and without that of a wrapper"
        )
    if surplus:
        known = f"lora_A, lora_B or {MAGNITUDE}" if dora else "lora_A or lora_B"
        bases = any(".base_layer." in k for k in surplus)
        way = ". PEFT leaves weights of the base out with save_pretrained(..., save_embedding_layers=False)"
        raise ValueError(
            f"{source} has keys that are no {known}: {some(surplus)}; nothing was loaded{way if bases else ''}"
        )
    missing = [f"{name}.{shown(part)}" for name, parts in found.items() for part in _missing(parts, dora)]
    if missing:
        raise ValueError(f"{source} lacks {some(missing)}; nothing was loaded")
    beside = [f"{name}.{MAGNITUDE}" for name, parts in found.items() if MAGNITUDE in parts and not dora]
    if beside:
        raise ValueError(
            f"{source} has {some(beside)}, but use_dora in {CONFIG} is false: the two files are not of one adapter. "
            "Nothing was loaded"
        )
    if not found:
        raise ValueError(f"{source} holds no adapter")
    for name, parts in found.items():
        check_values(parts, name, source)
    return StoredAdapters(source, found)


def _divided(layer: str, part: str, names: Collection[str]) -> tuple[str, str]:
    """Return the name of the layer that a key names, and the part of the key after it. Where PEFT has wrapped a module
    and another inside it, the part begins with "base_layer."."""
    if part in ("lora_A", "lora_B"):  # loralib's, which have no ".weight"
        part += ".weight"
    part = part.removesuffix(".weight") if part.startswith(MAGNITUDE) else part
    name = plain_name(layer, names)
    if name not in names and ".base_layer" in name:
        outer, _, inner = f"{layer}.".partition(".base_layer.")
        if inner or layer.endswith(".base_layer"):
            return plain_name(outer, names), f"base_layer.{inner}{part}"
    return name, part


def _missing(parts: Parts, dora: bool) -> list[str]:
    """Return the parts that are not there and should be."""
    wanted = [part[: (at := part.rindex("lora_"))] + _OTHER[part[at:]] for part in parts if part != MAGNITUDE]
    wanted = wanted or ["lora_A.weight", "lora_B.weight"]
    return [part for part in wanted + [MAGNITUDE] * dora if part not in parts]


def check_values(parts: Parts, name: str, source: str) -> None:
    """Raise ValueError for shapes or dtypes that no adapter has."""
    if odd := [f"{t.dtype}" for t in parts.values() if not t.is_floating_point()]:
        raise ValueError(f"{source}: the adapter of {name} is {odd[0]}, no floating type; nothing was loaded")
    for first, second in pairs(parts):
        a, b = parts[first], parts[second]
        if (
            a.ndim < 2
            or a.ndim != b.ndim
            or not 0 < b.shape[1] <= a.shape[0]
            or a.shape[0] % b.shape[1]
            or (a.ndim == 2 and a.shape[0] != b.shape[1])
        ):
            raise ValueError(
                f"{source}: {name}.{shown(first)} {tuple(a.shape)} and {shown(second)} {tuple(b.shape)} are not "
                "[r, in, ...] and [out, r, ...] (as those of loralib's MergedLinear); nothing was loaded"
            )
        m = parts.get(MAGNITUDE)
        if m is not None and m.numel() != b.shape[0]:
            raise ValueError(
                f"{source}: {name}.{MAGNITUDE} {tuple(m.shape)} is not [out], a number for each row of {shown(second)} "
                f"{tuple(b.shape)}; nothing was loaded"
            )
