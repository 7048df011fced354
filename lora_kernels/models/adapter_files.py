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

MAGNITUDE = "magnitude_vector"
# The magnitude's key has no ".weight": it was a parameter in the first PEFT with DoRA, and became a module later.
PEFT_KEY = re.compile(
    rf"({WRAPPER}\.)*base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB](?=\.weight)|{MAGNITUDE}$)(\.weight)?"
)
LORALIB_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])")


class LayerAdapter(NamedTuple):
    """The adapter of one layer."""

    a: Tensor
    """A [r, in]."""
    b: Tensor
    """B [out, r]."""
    m: Tensor | None = None
    """DoRA's magnitude [out]; None without DoRA."""


class StoredAdapters(NamedTuple):
    """The adapters that a file holds."""

    source: str
    """The file, or another source, as errors name it."""
    layers: dict[str, LayerAdapter]
    """The adapters by layer name."""


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
    """Return A and B, and with `dora` m, of each layer, from tensors whose names the regular expression `key` matches.
    The layers have the names of the model, whose plain names are `names`, also where the file was written from a
    wrapped model.

    Raises ValueError for a name that `key` does not match, for a layer that lacks a part or has one too many or two
    times, and for shapes or dtypes that an adapter cannot have.
    """
    found: dict[str, dict[str, Tensor]] = {}
    surplus, twice = [], []
    for k, tensor in sorted(state.items()):  # the order of a safetensors file differs between processes
        match = key.fullmatch(k)
        if match:
            layer = plain_name(match["layer"], names)
            if match["part"] in found.setdefault(layer, {}):
                twice.append(f"{layer}.lora_{match['part']}")
            found[layer][match["part"]] = tensor
        else:
            surplus.append(k)
    if twice:
        raise ValueError(f"{source} has two values for {some(twice)}, with and without the name of a wrapper")
    if surplus:
        known = f"lora_A, lora_B or lora_{MAGNITUDE}" if dora else "lora_A or lora_B"
        bases = any(".base_layer." in k for k in surplus)
        way = ". PEFT leaves weights of the base out with save_pretrained(..., save_embedding_layers=False)"
        raise ValueError(
            f"{source} has keys that are no {known}: {some(surplus)}; nothing was loaded{way if bases else ''}"
        )
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
    adapters = {name: LayerAdapter(parts["A"], parts["B"], parts.get(MAGNITUDE)) for name, parts in found.items()}
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
    return StoredAdapters(source, adapters)
