"""What the kernels find on this machine, as `doctor` reports it: devices, native modules, and which back-ends serve."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

import torch

from lora_kernels.backends import dispatch
from lora_kernels.backends.cuda import launch
from lora_kernels.core import built
from lora_kernels.core.operands import Call
from lora_kernels.testing import machine
from lora_kernels.testing.names import SHORT
from lora_kernels.tools import evidence_here
from lora_kernels.tools.packages import is_there, without_paths

_COMPILER = f"install {built.COMPILER}, then: {built.reinstall()}"
_NVCC = f"for Hopper GPUs only: install the CUDA toolkit, then: {built.reinstall(cuda=True)}"
_TRITON = "pip install 'lora_kernels[triton]' (Linux)"
_TORCH_CUDA = "install a build of torch for your GPU: https://pytorch.org/get-started/locally"
_DRIVER = "install or load the GPU's driver (nvidia-smi should list the device)"


def examine() -> dict[str, Any]:
    """Return what is here, as plain data without absolute paths."""
    devices = _devices()
    report: dict[str, Any] = {
        "devices": [{"device": str(device), **machine.describe_device(device)} for device in devices],
        "native": _native_cpu(),
        "cuda": _native_cuda(),
        "backends": [_backend(name, devices) for name in dispatch.BACKENDS],
        "evidence": evidence_here.examine(devices),
    }
    report["missing"] = _missing(report)
    return report


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _native_cpu() -> dict[str, Any]:
    module = _extension("_C")
    if isinstance(module, str):
        return {"built": False, "reason": module}
    try:
        from lora_kernels.backends.cpu import paths
    except ImportError as error:  # a module from another version of the package
        return {"built": False, "reason": without_paths(str(error))}
    return {
        "built": True,
        "isa": module.cpu_isa(),
        "isas": list(module.cpu_isas()),
        "openmp": module.openmp,
        "lacking": {name: without_paths(why) for name, why in paths.lacking().items()},
    }


def _native_cuda() -> dict[str, Any]:
    module = _extension("_cuda")
    if isinstance(module, str):
        return {"built": False, "reason": module}
    info = module.build_info()
    report = {"built": True, **info, "needs_driver": info["driver"]}
    try:
        report["driver"] = f"answers: {len(module.devices())} devices"
    except RuntimeError as error:
        report["driver"] = without_paths(str(error))
    return report


def _extension(name: str) -> ModuleType | str:
    """Return a native module, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(f"lora_kernels.{name}")
    except Exception as error:
        return without_paths(str(error))


def _backend(name: str, devices: list[torch.device]) -> dict[str, Any]:
    """Return the dtypes that a back-end serves on each device, or every reason if it serves none."""
    serves: dict[str, list[str]] = {}
    automatic, reasons = [], []
    for device in devices:
        for dtype, short in SHORT.items():
            call = Call("forward", device, dtype, dtype, 512, 1024, 1024, 16, dropout=True)
            refused = [r for op in ("forward", "backward") for r in dispatch.refusals(name, call._replace(op=op))]
            if refused:
                reasons += refused
                continue
            serves.setdefault(str(device), []).append(short)
            if _automatic(call) == name:
                automatic.append(str(device))
    return {
        "name": name,
        "ready": bool(serves),
        "serves": serves,
        "automatic": list(dict.fromkeys(automatic)),
        "reasons": [] if serves else list(dict.fromkeys(map(without_paths, reasons))),
    }


def _automatic(call: Call) -> str:
    """Return the automatic choice. On a GPU where it depends on the check at the first use, that check is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says what the warnings would
        return dispatch.automatic(call)


def _missing(report: dict[str, Any]) -> list[dict[str, str]]:
    """Return the parts that are not there, and how to get each."""
    missing = []
    if not report["native"]["built"]:
        missing.append(("CPU kernels", _COMPILER))
    if not is_there("triton"):
        missing.append(("Triton", _TRITON))
    if not report["cuda"]["built"]:
        missing.append(("CUDA kernels", _NVCC))
    elif torch.cuda.is_available() and torch.version.hip is None and (fault := launch.driver_fault()):
        missing.append(("CUDA kernels", fault))
    if not torch.cuda.is_available():
        built_for_gpu = torch.version.cuda is not None or torch.version.hip is not None
        missing.append(
            ("a GPU", _DRIVER if built_for_gpu else f"torch {torch.__version__} is built without CUDA: {_TORCH_CUDA}")
        )
    missing += evidence_here.missing(report["evidence"])
    return [{"what": what, "how": how} for what, how in missing]


def facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the first table of `doctor`: devices and native modules."""
    native, cuda = report["native"], report["cuda"]
    rows = []
    for device in report["devices"]:
        if device["type"] == "cpu":
            text = f"{device['name']}, {device['cores']} cores, {device['threads']} threads, {device['isa']}"
        else:
            text = f"{device['name']}, {device['arch']}, driver {device['driver']}"
        rows.append((device["device"], text))
    if native["built"]:
        openmp = "with OpenMP" if native["openmp"] else "without OpenMP: one thread"
        rows.append(("CPU kernels", f"built, running {native['isa']} (of {', '.join(native['isas'])}), {openmp}"))
        rows += [("", f"without {name}, which this processor has: {why}") for name, why in native["lacking"].items()]
    else:
        rows.append(("CPU kernels", f"not built: {native['reason']}"))
    if cuda["built"]:
        built_for = f"built by nvcc {cuda['nvcc']} for {cuda['arch']}; needs driver {cuda['needs_driver']} or later"
        rows.append(("CUDA kernels", f"{built_for}; driver: {cuda['driver']}"))
    else:
        rows.append(("CUDA kernels", f"not built: {cuda['reason']}"))
    return rows


def verdict(backend: dict[str, Any]) -> list[str]:
    """Return what a back-end serves by device, or why it serves nothing."""
    lines = list(backend["reasons"])
    for device, dtypes in backend["serves"].items():
        chosen = ", the automatic choice" if device in backend["automatic"] else ""
        lines.append(f"{device}: {', '.join(dtypes)}{chosen}")
    return lines
