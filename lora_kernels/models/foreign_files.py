"""The adapter files of other tools where `load_adapter` looks for PEFT's: which file there is, and whose it is."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lora_kernels.models.adapter_config import CONFIG
from lora_kernels.models.adapter_files import PEFT_KEY, WEIGHTS, read_header
from lora_kernels.models.diffusers_files import is_of_diffusers, load_diffusers
from lora_kernels.models.lycoris import is_of_lycoris, load_lycoris
from lora_kernels.models.reports import ApplyReport
from lora_kernels.models.targets import some


def foreign_file(path: Path) -> Path | None:
    """Return the safetensors file of another tool that `path` is, or that is the only one in the directory `path`. None
    where PEFT's two files are there, or no safetensors file at all.

    Raises ValueError where a directory without PEFT's config has several safetensors files.
    """
    directory = path.parent if path.is_file() else path
    if (directory / CONFIG).exists() and (path.name == WEIGHTS or path == directory):
        return None
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(files) > 1:
        raise ValueError(
            f"{path} has no {CONFIG}, and several safetensors files: pass the path of one of "
            f"{some([file.name for file in files])}. Nothing was loaded"
        )
    return files[0] if files else None


def load_foreign(model: nn.Module, path: Path, prefix: str | None) -> ApplyReport:
    """Load the adapter in the safetensors file `path`, by the function of the tool whose keys it has."""
    keys = read_header(path)
    if keys and is_of_lycoris(keys):
        return load_lycoris(model, path, prefix=prefix)
    if keys and is_of_diffusers(keys) and not any(PEFT_KEY.fullmatch(key) for key in keys):
        return load_diffusers(model, path, prefix=prefix)
    if any(PEFT_KEY.fullmatch(key) for key in keys):
        raise FileNotFoundError(
            f"{path} has PEFT's keys, and there is no {CONFIG} beside it, which has lora_alpha: get that file too. "
            "Nothing was loaded"
        )
    raise ValueError(
        f"{path} has keys that are of no tool known here (PEFT, diffusers, kohya's sd-scripts, LyCORIS): "
        f"{some(sorted(keys))}. loralib's are loaded by load_loralib. Nothing was loaded"
    )
