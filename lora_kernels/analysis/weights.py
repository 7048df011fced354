"""The tensors of a whole model, of a module or of safetensors files, one at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_kernels.core import atomic
from lora_kernels.models.adapter_files import safetensors_torch
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import plain_names
from lora_kernels.models.pairs import CONV, EMBEDDING, LINEAR, pairs
from lora_kernels.models.targets import some
from lora_kernels.nn.fit import Conv1DLike

TRANSPOSED = "transposed"
"""The kind of transformers' Conv1D, whose weight is [K, N]. The others are those of `lora_kernels.models.pairs`."""

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_TRANSPOSED_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""The model_type of the models of transformers whose layers c_attn, c_proj, c_fc and q_attn are Conv1D."""
_TRANSPOSED_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
_EMBEDDINGS = ("embed", "wte", "wpe", "emb", "shared")
"""Parts of the names of embeddings, for files, which do not tell the classes of modules."""

Source = nn.Module | str | os.PathLike[str]


class Weights:
    """The tensors of a model by their names, read when they are asked for."""

    name: str
    """The name in errors."""
    guesses = False
    """Whether `kind` goes by names, because the classes of the modules are not known."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        raise NotImplementedError

    def tensor(self, name: str) -> Tensor:
        """Return a tensor."""
        raise NotImplementedError

    def kind(self, name: str) -> str:
        """Return what the tensor is the weight of: LINEAR, TRANSPOSED, CONV or EMBEDDING; "" where it is something
        else, or where nobody knows."""
        raise NotImplementedError

    def modules(self) -> list[str]:
        """Return the names of the modules that have tensors."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.shapes()))


def weights_of(source: Source) -> Weights:
    """Return the tensors of a model, of a directory with safetensors or of one such file. Raises ValueError for a model
    with adapters or without values, and FileNotFoundError or ValueError for files."""
    return _OfModel(source) if isinstance(source, nn.Module) else _OfFiles(Path(source))


class _OfModel(Weights):
    def __init__(self, model: nn.Module) -> None:
        self.name = f"the {type(model).__name__}"
        if adapted := [*lora_layers(model), *(pair.name for pair in pairs(model))]:
            raise ValueError(
                f"{self.name} has adapters in {some(list(dict.fromkeys(adapted)))}: merge_and_unload() it, so that its "
                "weights are all that it is"
            )
        self._tensors: dict[str, Tensor] = {}
        self._modules: dict[str, nn.Module] = {}
        first: dict[int, str] = {}
        for name, _, module in plain_names(model):
            kept = {k: t for k, t in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set}
            for key, tensor in {**dict(module.named_parameters(recurse=False)), **kept}.items():
                own = f"{name}.{key}" if name else key
                if first.setdefault(id(tensor), own) == own:  # a tied weight counts once, under its first name
                    self._tensors[own] = tensor.detach()
                    self._modules[own] = module
        odd = [f"{n} (a {type(t).__name__})" for n, t in self._tensors.items() if is_traceable_wrapper_subclass(t)]
        if odd:
            raise ValueError(f"{self.name} has sharded or quantised weights: {some(odd)}; give a whole, dense model")
        if empty := [name for name, tensor in self._tensors.items() if tensor.is_meta]:
            raise ValueError(f"{self.name} has no values for {some(empty)}: they are on the meta device")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def kind(self, name: str) -> str:
        module: Any = self._modules[name]
        if name.rpartition(".")[2] != "weight":
            return ""
        if isinstance(module, Conv1DLike):
            return TRANSPOSED
        if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            return CONV if module.groups == 1 else ""
        if isinstance(module, nn.Embedding):
            return EMBEDDING
        return LINEAR if isinstance(module, nn.Linear) else ""


class _OfFiles(Weights):
    guesses = True

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._open = safetensors_torch().safe_open
        self._handles: dict[Path, Any] = {}
        self._files = _files_of(path)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, Path] = {}
        for file in self._files:
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118  # it is no dictionary
                if name in self._places:
                    raise ValueError(f"{name} is in {self._places[name].name} and in {file.name} of {path}")
                self._places[name] = file
                self._shapes[name] = tuple(handle.get_slice(name).get_shape())
        self._type = _model_type(path if path.is_dir() else path.parent)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._handle(self._places[name]).get_tensor(name)
        return tensor

    def kind(self, name: str) -> str:
        module, _, key = name.rpartition(".")
        last = module.rpartition(".")[2]
        if key != "weight" or len(self._shapes[name]) != 2:
            return ""
        if self._type in _TRANSPOSED_TYPES and last in _TRANSPOSED_NAMES:
            return TRANSPOSED
        return EMBEDDING if any(part in last.lower() for part in _EMBEDDINGS) else LINEAR

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = self._open(file, "pt")
            except Exception as error:  # a broken header raises several types beside SafetensorError
                raise ValueError(f"{file} is cut short or not a safetensors file ({error})") from error
        return self._handles[file]


def _files_of(path: Path) -> list[Path]:
    """Return the safetensors files of a model: those of its index, or its one file, or all that there are."""
    if path.is_file():
        return [path]
    if (path / _INDEX).is_file():
        try:
            places: Mapping[str, str] = json.loads(atomic.contents(path / _INDEX))["weight_map"]
            files = [path / Path(each).name for each in dict.fromkeys(places.values())]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path / _INDEX} is no index of safetensors files ({error})") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{path} lacks {some(missing)}, which {_INDEX} names")
        return files
    files = [path / _WHOLE] if (path / _WHOLE).is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        what = "no safetensors file in" if path.is_dir() else "no"
        raise FileNotFoundError(f"there is {what} {path} (pickles are not read: save the model as safetensors)")
    return files


def _model_type(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
        return str(json.loads(atomic.contents(folder / "config.json")).get("model_type"))
    return ""


def difference(tuned: Tensor, base: Tensor) -> Tensor:
    """Return tuned - base, computed in fp64 and, where it is large, rounded once to fp32."""
    if tuned.numel() <= 1 << 22:
        return tuned.double() - base.to(tuned.device).double()
    out = torch.empty(tuned.shape, device=tuned.device)
    for mine, theirs, into in zip(tuned.split(512), base.split(512), out.split(512), strict=True):
        into.copy_(mine.double() - theirs.to(mine.device).double())
    return out


def relative_difference(tuned: Tensor, base: Tensor) -> float:
    """Return ‖tuned - base‖ / ‖base‖ in fp64, without a copy of the whole in fp64."""
    mine, theirs = tuned.reshape(-1), base.to(tuned.device).reshape(-1)
    far, norm = [], []
    for one, other in zip(mine.split(1 << 20), theirs.split(1 << 20), strict=True):
        far.append(torch.linalg.vector_norm(one.double() - other.double()).item())
        norm.append(torch.linalg.vector_norm(other.double()).item())
    return math.hypot(*far) / size if (size := math.hypot(*norm)) else math.inf
