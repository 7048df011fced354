"""``python -m lora_kernels doctor``: which back-ends serve this machine, what is missing, and how to get it."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import warnings
from types import ModuleType
from typing import Any

import torch

from lora_kernels.backends import dispatch
from lora_kernels.backends.cuda import launch
from lora_kernels.core.operands import Call
from lora_kernels.testing import machine
from lora_kernels.testing.names import SHORT
from lora_kernels.testing.terminal import Terminal, terminal
from lora_kernels.tools import evidence_here

_COMPILER = (
    "install a C++17 compiler (Debian: apt install g++ python3-dev), then install lora_kernels from source again"
)
_NVCC = "install the CUDA toolkit, then install lora_kernels from source again with LORA_KERNELS_CUDA=1"
_TRITON = "pip install 'lora_kernels[triton]' (Linux)"
_TORCH_CUDA = "install a build of torch for your GPU: https://pytorch.org/get-started/locally"
_DRIVER = "install or load the GPU's driver (nvidia-smi should list the device)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def main(args: argparse.Namespace) -> int:
    """Return the exit status: 0 if at least one back-end serves this machine, else 1."""
    report = examine()
    if args.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        _show(report, terminal())
    return 0 if any(entry["ready"] for entry in report["backends"]) else 1


def examine() -> dict[str, Any]:
    """Return the report as plain data, without absolute paths."""
    devices = _devices()
    report = {
        "versions": machine.versions("torch", "triton", "peft", "transformers"),
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
    return {"built": True, "isa": module.cpu_isa(), "isas": list(module.cpu_isas()), "openmp": module.openmp}


def _native_cuda() -> dict[str, Any]:
    module = _extension("_cuda")
    if isinstance(module, str):
        return {"built": False, "reason": module}
    info = module.build_info()
    report = {"built": True, **info, "needs_driver": info["driver"]}
    try:
        report["driver"] = f"answers: {len(module.devices())} devices"
    except RuntimeError as error:
        report["driver"] = _without_paths(str(error))
    return report


def _extension(name: str) -> ModuleType | str:
    """Return a native module, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(f"lora_kernels.{name}")
    except ImportError as error:
        return _without_paths(str(error))


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
        "reasons": [] if serves else list(dict.fromkeys(map(_without_paths, reasons))),
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
    if importlib.util.find_spec("triton") is None:
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


def _without_paths(text: str) -> str:
    """Return `text` with every absolute path cut to its last part."""
    return re.sub(r"(?<![\w/:.])/(?:[^\s/:'\"]+/)+([^\s/:'\"]+)", r"\1", text)


def _show(report: dict[str, Any], show: Terminal) -> None:
    show.table("lora_kernels doctor", ["", "what is here"], [[name, text] for name, text in _facts(report)], words=True)
    rows = []
    for backend in report["backends"]:
        for i, text in enumerate(_verdict(backend)):
            state = "ready" if backend["ready"] else "not ready"
            rows.append([backend["name"], state, text] if i == 0 else ["", "", text])
    show.table("Back-ends", ["", "", "serves, or why not"], rows, words=True)
    if report["evidence"]:
        show.table("Evidence", ["", "what is known about the GPU"], evidence_here.rows(report["evidence"]), words=True)
    if report["missing"]:
        rows = [[entry["what"], entry["how"]] for entry in report["missing"]]
        show.table("What is missing", ["", "how to get it"], rows, words=True)


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    native, cuda = report["native"], report["cuda"]
    facts = [
        ("versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in report["versions"].items()))
    ]
    for device in report["devices"]:
        if device["type"] == "cpu":
            text = f"{device['name']}, {device['cores']} cores, {device['threads']} threads, {device['isa']}"
        else:
            text = f"{device['name']}, {device['arch']}, driver {device['driver']}"
        facts.append((device["device"], text))
    if native["built"]:
        openmp = "with OpenMP" if native["openmp"] else "without OpenMP: one thread"
        facts.append(("CPU kernels", f"built, running {native['isa']} (of {', '.join(native['isas'])}), {openmp}"))
    else:
        facts.append(("CPU kernels", f"not built: {native['reason']}"))
    if cuda["built"]:
        built = f"built by nvcc {cuda['nvcc']} for {cuda['arch']}; needs driver {cuda['needs_driver']} or later"
        facts.append(("CUDA kernels", f"{built}; driver: {cuda['driver']}"))
    else:
        facts.append(("CUDA kernels", f"not built: {cuda['reason']}"))
    return facts


def _verdict(backend: dict[str, Any]) -> list[str]:
    lines = list(backend["reasons"])
    for device, dtypes in backend["serves"].items():
        chosen = ", the automatic choice" if device in backend["automatic"] else ""
        lines.append(f"{device}: {', '.join(dtypes)}{chosen}")
    return lines
