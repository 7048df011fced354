"""The launches of `lora_kernels._cuda` on a stand-in for the CUDA runtime: bindings, plans, tensor maps and launches
are the project's own, and no kernel runs.

The module itself cannot run on a stand-in for the driver. It holds NVIDIA's runtime, which asks the driver for tables
of functions that are not documented.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import json
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from support import sm90
from support.paths import ROOT, SUPPORT

FOLDER = SUPPORT / "stand_in"
SOURCES = [FOLDER / "extension.cpp", FOLDER / "extension_backward.cpp"]


class TensorMap(NamedTuple):
    """The arguments of cuTensorMapEncodeTiled for a matrix, with rows before columns."""

    address: int
    shape: tuple[int, int]
    row_bytes: int
    """The distance of two rows."""
    box: tuple[int, int]
    swizzle: int
    """In bytes."""
    bf16: bool


class Launched(NamedTuple):
    """A launch that the runtime accepted, and the parameters that all kernels have."""

    kernel: str
    """The name, with its template arguments. Empty for the decode kernel, whose name is local to its file."""
    device: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cluster: int
    stream: int
    sizes: tuple[int, int, int, int]
    """M, N, K, R."""
    counters: int
    counter_count: int
    seed: int
    threshold: int
    rescale: float
    scale: float


class Runtime:
    """The extension, as `backends/cuda/launch.py` uses it, and what the runtime has recorded. CPU tensors pass for
    tensors on device `ordinal`."""

    def __init__(self, ordinal: int = 0) -> None:
        self.ordinal = ordinal
        self.library, self.module = _loaded()
        self.take()
        self.allow_clusters(66)

    def Sm90Forward(self, **operands: Any) -> Any:
        return self.module.Sm90Forward(**{**operands, "device": self.ordinal})

    def Sm90Backward(self, **operands: Any) -> Any:
        return self.module.Sm90Backward(**{**operands, "device": self.ordinal})

    def take(self) -> tuple[list[TensorMap], list[Launched]]:
        """Return the tensor maps and the launches since the last time."""
        maps, launches = [], []
        for record in json.loads(self.library.stand_in_records())[:-1]:
            if record.pop("call") == "map":
                (columns, rows), (box_columns, box_rows) = record["size"], record["box"]
                maps.append(
                    TensorMap(
                        record["address"], (rows, columns), record["stride"], (box_rows, box_columns),
                        record["swizzle"], record["bf16"],
                    )
                )  # fmt: skip
            else:
                launches.append(Launched(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}))
        return maps, launches

    def fail_next_launch(self, status: int) -> None:
        """Let the next launch return a cudaError_t."""
        self.library.stand_in_fail_next_launch(status)

    def allow_clusters(self, count: int) -> None:
        """Let the runtime say that so many clusters can run at the same time."""
        self.library.stand_in_allow_clusters(count)

    @property
    def occupancy_questions(self) -> int:
        """How often the runtime was asked that, since the process started."""
        return int(self.library.stand_in_occupancy_questions())


@functools.cache
def _loaded() -> tuple[ctypes.CDLL, ModuleType]:
    csrc = ROOT / "csrc"
    watched = [
        path
        for folder in (FOLDER, SUPPORT / "sm90_machine", csrc, csrc / "cuda", csrc / "cuda" / "sm90")
        for path in folder.iterdir()
        if path.suffix in (".h", ".cpp", ".cuh", ".cu")
    ]
    folders = [sm90.cuda_include(), sysconfig.get_paths()["include"], Path(torch.__file__).parent / "include"]
    flags = ["-O0", "-U_FORTIFY_SOURCE", "-Wno-psabi", *(f"-I{each}" for each in folders)]
    path = str(sm90.compiled(SOURCES, watched, flags))
    loader = importlib.machinery.ExtensionFileLoader("_cuda", path)
    spec = importlib.util.spec_from_loader("_cuda", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    library = ctypes.CDLL(path)
    library.stand_in_records.restype = ctypes.c_char_p
    return library, module
