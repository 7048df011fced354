"""A description of the machine and the software on which a number was measured: device, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from lora_kernels.core.version import __version__

ROOT = Path(__file__).resolve().parents[2]
"""The folder of the checkout, if the package runs from one."""


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return name, cores, threads and instruction set of the CPU, or name, architecture, memory and driver of a GPU."""
    cpu = {
        "name": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu_isa(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type != "cuda":
        return {"type": "cpu"} | cpu
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "host": cpu,
    }


def cpu_name() -> str:
    """Return the model name that the CPU reports."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def cpu_isa() -> str:
    """Return the instruction set that torch uses here, and the bf16 instructions that the CPU has beside it."""
    isa = torch.backends.cpu.get_cpu_capability()
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return " ".join([isa, *(flag for flag in ("avx512_bf16", "amx_bf16") if re.search(rf"\b{flag}\b", flags))])


def kind(device: dict[str, Any]) -> str:
    """Return the name of a device for a file of results, from what `describe_device` returns."""
    words = re.sub(r"\(r\)|\(tm\)|\bcpu\b|@.*", " ", device["name"].lower())
    suffix = f"-{device['threads']}-threads" if device["type"] == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") + suffix


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of Python, of this package and of `packages`; None for a package that is not installed."""
    return {"python": platform.python_version(), "lora_kernels": __version__} | {
        name: _version(name) for name in packages
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any] | None:
    """Return {"id", "dirty"} of the checkout, or None if the package does not run from one."""
    if not (ROOT / ".git").exists():
        return None
    git = ("git", "--no-optional-locks", "-C", str(ROOT))
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return {"id": _output(*git, "rev-parse", "--verify", "-q", "HEAD"), "dirty": changes != ""}


def _output(*command: str) -> str | None:
    """Return the output of a command, or None if there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
