"""The choice of the nvcc that builds `_cuda`, and the hash of the sources that it compiles.

The module is linked with the static CUDA runtime of that toolkit. So it needs a driver for the toolkit's major version
of CUDA, as the installed torch does for its own. Therefore the nvcc that fits torch is preferred.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent
LOCAL = Path("/usr/local")
"""The folder that NVIDIA's installers put toolkits in."""
OLDEST = (12, 4)
"""The oldest nvcc that these sources were built with."""

Version = tuple[int, int]


def cuda_choice() -> str:
    """Return what LORA_KERNELS_CUDA says: "0" (default), "auto" or "1". SystemExit for anything else."""
    choice = os.environ.get("LORA_KERNELS_CUDA") or "0"
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"LORA_KERNELS_CUDA={choice!r}: expected 0 (the default), auto or 1")
    return choice


def wanted_nvcc() -> str | None:
    """Return the path of the nvcc to build `_cuda` with, or None where LORA_KERNELS_CUDA is 0 or none will do.

    Compiling `_cuda` takes minutes, and only Hopper GPUs run it. So nobody gets it unasked.

    It is the one in CUDA_HOME or CUDA_PATH. Without these it is the first on PATH or in /usr/local/cuda* that has the
    CUDA major version of the installed torch, else the first. A warning tells of one that is too old. SystemExit if
    LORA_KERNELS_CUDA is 1 and none will do.
    """
    choice = cuda_choice()
    if choice == "0":
        return None
    found = [(nvcc, version_of(nvcc)) for nvcc in find_nvccs()]
    new_enough = [(nvcc, version) for nvcc, version in found if version >= OLDEST]
    if new_enough:
        major = torch_cuda_major()
        return next((nvcc for nvcc, version in new_enough if version[0] == major), new_enough[0][0])
    least = "nvcc {}.{}".format(*OLDEST)
    if found:
        old = ", ".join("{} is nvcc {}.{}".format(nvcc, *version) for nvcc, version in found)
        why = f"the CUDA kernels need {least} or later, which compiles for sm_90a, and {old}"
    else:
        why = "there is no nvcc in CUDA_HOME or CUDA_PATH, on PATH or in /usr/local/cuda*"
    if choice == "1":
        raise SystemExit(
            f"LORA_KERNELS_CUDA=1, but {why}: install the CUDA toolkit, point CUDA_HOME at it, or leave "
            "LORA_KERNELS_CUDA out"
        )
    if found:
        print(f"WARNING: lora_kernels installs without its CUDA kernels: {why}.", file=sys.stderr)
    return None


def find_nvccs() -> list[str]:
    """Return the paths to choose from: the one in CUDA_HOME or CUDA_PATH alone if it is there, else all others."""
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        if Path(home, "bin", "nvcc").exists():
            return [str(Path(home, "bin", "nvcc"))]
    folders = [LOCAL / "cuda", *sorted(LOCAL.glob("cuda-*"), key=_numbers, reverse=True)]
    found = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{folder}/bin") for folder in folders)]
    return list(dict.fromkeys(filter(None, found)))


def _numbers(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder.name)]


def version_of(nvcc: str) -> Version:
    """Return the version that an nvcc says it has, or (0, 0) where it says none."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        said = ""
    release = re.search(r"release (\d+)\.(\d+)", said)
    return (int(release[1]), int(release[2])) if release else (0, 0)


def torch_cuda_major() -> int | None:
    """Return the major version of CUDA that the installed torch is built for, without importing it. None for a torch
    without CUDA, and where torch is not there, as in an isolated build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return None
    release = re.search(r"^cuda\b.*?=\s*['\"](\d+)\.", text, re.MULTILINE)
    return int(release[1]) if release else None


def cuda_sources() -> list[Path]:
    """Return every file that `_cuda` is compiled from."""
    kinds = (".cu", ".cuh", ".cpp", ".h")
    return sorted([*(path for path in (CSRC / "cuda").rglob("*") if path.suffix in kinds), CSRC / "philox.h"])


def source_hash() -> str:
    """Return a hash of the contents of `cuda_sources` and of their places in csrc."""
    digest = hashlib.sha256()
    for path in cuda_sources():
        text = path.read_bytes()
        digest.update(f"{path.relative_to(CSRC).as_posix()}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()[:16]
