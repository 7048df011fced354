"""The tensors of an adapter on disk, under PEFT's or loralib's keys.

Tensors are checked when they are read. Of several files, all are replaced or none. Nothing is unpickled.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lora_kernels.models.adapter_config import CONFIG
from lora_kernels.models.targets import some

WEIGHTS = "adapter_model.safetensors"
"""The name of PEFT's file of tensors."""

MAGNITUDE = "magnitude_vector"
# The magnitude's key has no ".weight": it was a parameter in the first PEFT with DoRA, and became a module later.
PEFT_KEY = re.compile(rf"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB](?=\.weight)|{MAGNITUDE}$)(\.weight)?")
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
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        more = f" ({pickled.name} is a pickle and is not read: save it anew as safetensors)" if pickled.exists() else ""
        raise FileNotFoundError(f"there is no {path}{more}")
    try:
        # The file is read, not mapped into memory, so that a later change of it changes nothing here.
        return st.load(path.read_bytes())
    except Exception as error:  # a broken header raises several types beside SafetensorError
        raise ValueError(f"{path} is cut short or not a safetensors file ({error}); nothing was loaded") from error


def adapters_of(state: Mapping[str, Tensor], key: re.Pattern[str], dora: bool, source: str) -> StoredAdapters:
    """Return A and B, and with `dora` m, of each layer, from tensors whose names the regular expression `key` matches.

    Raises ValueError for a name that `key` does not match, for a layer that lacks a part or has one too many, and for
    shapes or dtypes that an adapter cannot have.
    """
    found: dict[str, dict[str, Tensor]] = {}
    surplus = []
    for k, tensor in sorted(state.items()):  # the order of a safetensors file differs between processes
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


def write_all(files: dict[Path, bytes]) -> None:
    """Replace the files by these contents, in this order. On an error none is replaced."""
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
        for path, kept in old.items():  # to restore it from; a copy, since not every file system has links
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
