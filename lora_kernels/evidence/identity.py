"""The device, the versions and the sources that a finding about a GPU kernel is valid for."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import re
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGE = Path(__file__).resolve().parents[1]
_SOURCES = (
    "backends/composite", "backends/triton", "backends/cuda", "backends/workspace.py", "plans", "core/dropout.py",
)  # fmt: skip
"""The files and folders of the package that the results or the speed of a GPU kernel depend on."""


class Identity(NamedTuple):
    """Everything that a finding about a GPU kernel depends on beside the call."""

    device: str
    """The name that the driver gives the device. A part of a GPU (MIG) has a name of its own."""
    arch: str
    """The architecture: "sm_90", or AMD's name for it, "gfx942"."""
    multiprocessors: int
    driver: str
    """The version of the GPU's driver."""
    torch: str
    triton: str | None
    """The version of Triton; None where it is not installed."""
    ptxas: str | None
    """The version of the assembler that Triton uses; None where Triton has none."""
    sources: str
    """A hash of the package's own GPU code in Python."""
    extension: str | None
    """The CUDA sources and the compiler that `lora_kernels._cuda` was built from; None where it is not built."""


TOLERATED = frozenset({"driver", "torch"})
"""The fields in which a file that is shipped with the package may differ: no two machines agree in all of them."""


@functools.cache
def identify(device: torch.device) -> Identity:
    """Return the identity of a GPU of this machine with the software that is installed. It is found out once for each
    device and process."""
    properties = torch.cuda.get_device_properties(device)
    arch = architecture(device)
    return Identity(
        properties.name, arch, properties.multi_processor_count, _driver(), torch.__version__, triton_version(),
        _ptxas(arch), source_hash(), _extension(),
    )  # fmt: skip


def architecture(device: torch.device) -> str:
    """Return the architecture of a GPU: "sm_90", or AMD's name for it, "gfx942"."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def differences(kept: Identity, here: Identity, shipped: bool = False) -> list[str]:
    """Return in what `kept` differs from `here`, as phrases such as "driver 535 then, 580 now". A `shipped` file may
    differ in the fields of `TOLERATED`."""
    tolerated = TOLERATED if shipped else frozenset[str]()
    return [
        f"{name} {'none' if then is None else then} then, {'none' if now is None else now} now"
        for name, then, now in zip(Identity._fields, kept, here, strict=True)
        if then != now and name not in tolerated
    ]


def triton_version() -> str | None:
    """Return Triton's version without importing it. Some builds of torch bring it under another name."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def source_hash() -> str:
    """Return a hash of the files in `_SOURCES`. It does not depend on where the package is installed."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        place = PACKAGE / name
        for path in [place] if place.suffix else sorted(place.rglob("*.py")):
            digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _extension() -> str | None:
    try:
        info = importlib.import_module(".._cuda", __package__).build_info()
    except ImportError:
        return None
    return f"{info.get('sources', 'unknown')} by nvcc {info['nvcc']}"


def _driver() -> str:
    """Return the version of the kernel's driver, or, where it is hidden, the CUDA version that the driver speaks."""
    for place in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            text = Path(place).read_text()
        except OSError:
            continue
        if found := re.search(r"\d+(?:\.\d+)+", text.partition("\n")[0]):
            return found[0]
    return "unknown" if torch.version.hip else f"for CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


def _ptxas(arch: str) -> str | None:
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        tool = get_ptxas(int(arch[3:])) if arch.startswith("sm_") else None
    except (ImportError, RuntimeError, TypeError, ValueError):
        return None
    return None if tool is None else str(tool.version)
