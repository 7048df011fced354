"""The one OpenMP runtime of the process, which is torch's.

`_C` is linked to no OpenMP runtime: a second one beside torch's would keep threads of its own, and the threads of two
runtimes take the cores from each other. torch's has another file name in every kind of build. Its functions are found
because torch loads it for all libraries of the process (RTLD_GLOBAL).
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

_ENTRIES = ("GOMP_parallel", "__kmpc_fork_call")  # of gcc's libgomp, and of LLVM's libomp
_NAMES = ("libgomp", "libomp", "libiomp5")


def provide() -> None:
    """Make the runtime's functions visible to `_C`, where torch has not done so.

    The runtime is one that the process has loaded, torch's before that of another package such as scikit-learn; else
    one beside torch, else the system's. OSError where none loads.
    """
    process = ctypes.CDLL(None) if sys.platform != "win32" else None
    if process is None or any(hasattr(process, entry) for entry in _ENTRIES):
        return
    loaded, beside = runtimes(), _beside_torch()
    order = [*(path for path in beside if path in loaded), *loaded, *beside, "libgomp.so.1"]
    ctypes.CDLL(order[0], mode=ctypes.RTLD_GLOBAL)


def runtimes() -> list[str]:
    """Return the files of the OpenMP runtimes that this process has loaded. Empty where the system does not tell
    (Linux does)."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = (line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    return list(dict.fromkeys(path for path in paths if Path(path).name.startswith(_NAMES)))


def _beside_torch() -> list[str]:
    package = Path(torch.__file__).parent
    folders = (package / "lib", package.with_name("torch.libs"))
    return [str(path) for folder in folders for name in _NAMES for path in sorted(folder.glob(f"{name}*"))]
