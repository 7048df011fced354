"""What the build of this installation left out, why, and how to get it.

The build writes it to `_built.json` in the package (csrc/native_record.py). The file is read when something is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent
REINSTALL = "pip install --no-cache-dir --force-reinstall --no-deps lora_kernels"
"""Without --no-cache-dir pip would take the wheel that it built before, kernels or not."""
REINSTALL_HERE = "pip install --no-deps -e ."
"""The same in a source tree."""
COMPILER = "a C++17 compiler and Python's headers (Debian: apt install g++ python3-dev)"


def record() -> dict[str, Any]:
    """Return what the build wrote: `platform`, `compiler`, `modules` and `left_out`, the last two by name with the
    reason. Empty where there is no such file, as in a source tree that was never built."""
    try:
        read = json.loads(PACKAGE.joinpath("_built.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def reinstall(cuda: bool = False) -> str:
    """Return the command that builds the package again, where `cuda` with the kernels for Hopper."""
    here = PACKAGE.parent.joinpath("csrc", "native_build.py").exists()
    command = REINSTALL_HERE if here else REINSTALL
    if not cuda:
        return command
    # A wheel from an index has no CUDA kernels, so the sources are compiled.
    return "LORA_KERNELS_CUDA=1 " + (command if here else command.replace("lora", "--no-binary lora_kernels lora", 1))


def why_missing(module: str) -> str:
    """Return why a native module, "_C" or "_cuda", is not in this installation, as far as its build has said."""
    told = record()
    reason = told.get("modules", {}).get(module)
    if reason is None:
        return "this installation was not built"
    if not reason:
        return f"it was built for {told.get('platform')}, and is not there or does not load"
    return f"when this installation was built: {reason}"


def left_out(path: str) -> str:
    """Return why the kernels of an instruction set were not compiled."""
    told = record()
    reason = told.get("left_out", {}).get(path, "the build does not say why")
    return f"{told['compiler']} could not compile them: {reason}" if told.get("compiler") else str(reason)
