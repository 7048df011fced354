"""A CUDA driver that runs nothing: Triton's compiler, binder and launcher work with it, and tests see what arrives.

`start` may be called once in a process that has no other driver, so tests do it in a process of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from lora_kernels.backends.triton import device
from lora_kernels.plans.tiles import Gpu

SOURCE = Path(__file__).with_name("libcuda.c")
CPU = torch.device("cpu")


class _Function(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 256),
        ("parameters", ctypes.c_uint32),
        ("offset", ctypes.c_uint32 * 192),
        ("size", ctypes.c_uint32 * 192),
    ]


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint32), ("value", ctypes.c_uint32 * 4)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.POINTER(_Function)),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
        ("attribute", _Attribute * 8),
        ("bytes", ctypes.c_uint8 * 4352),
    ]


class _Map(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("dims", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 5),
        *((field, ctypes.c_uint32) for field in ("type", "rank")),
        ("box", ctypes.c_uint32 * 5),
        *((field, ctypes.c_uint32) for field in ("swizzle", "l2", "fill")),
    ]


class TensorMap(NamedTuple):
    """A tensor map, with the sizes in the order of a tensor's."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In bytes, without the last one, which is that of an element."""
    box: tuple[int, ...]


class Recorded(NamedTuple):
    """A launch that the driver accepted."""

    kernel: str
    handle: int
    """The address of the function, as Triton has it."""
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int
    parameters: list[bytes]


class Driver:
    """The stand-in, and what it has recorded since `clear`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("launches", "maps", "modules"):
            getattr(library, f"stand_in_{name}").restype = ctypes.c_uint64
        library.stand_in_launch.restype = ctypes.POINTER(_Launch)
        library.stand_in_map.restype = ctypes.POINTER(_Map)
        self.clear()

    def clear(self) -> None:
        self._library.stand_in_clear()

    def fail_next_launch(self, error: int) -> None:
        """Let the next launch return a CUDA error."""
        self._library.stand_in_fail_next_launch(error)

    @property
    def modules(self) -> int:
        """The number of modules loaded: one for every compiled kernel."""
        return int(self._library.stand_in_modules())

    @property
    def count(self) -> int:
        """The number of launches."""
        return int(self._library.stand_in_launches())

    def launches(self) -> list[Recorded]:
        return [_recorded(self._library.stand_in_launch(i).contents) for i in range(self.count)]

    def map_of(self, parameter: bytes) -> TensorMap:
        """Return the tensor map that a kernel's parameter holds."""
        assert parameter[:8] == b"tensor=\0", "this parameter is no tensor map that the driver has made"
        record = self._library.stand_in_map(int.from_bytes(parameter[8:16], "little")).contents
        rank = record.rank
        return TensorMap(
            record.address,
            tuple(record.dims[:rank][::-1]),
            tuple(record.strides[: rank - 1][::-1]),
            tuple(record.box[:rank][::-1]),
        )


def _recorded(record: Any) -> Recorded:
    function, memory = record.function.contents, bytes(record.bytes)
    parameters = [
        memory[function.offset[i] : function.offset[i] + function.size[i]] for i in range(function.parameters)
    ]
    threads = record.block[0] * record.block[1] * record.block[2]
    handle = ctypes.addressof(function)
    return Recorded(
        function.name.decode(), handle, tuple(record.grid), threads, record.shared, record.stream, parameters
    )


def library() -> Path:
    """Return the stand-in for libcuda.so.1, compiled where it is not yet."""
    text = SOURCE.read_bytes()
    folder = Path(tempfile.gettempdir(), f"lora_kernels-stand-in-{os.getuid()}-{hashlib.sha256(text).hexdigest()[:16]}")
    path = folder / "libcuda.so.1"
    if not path.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished = folder / f"unfinished-{os.getpid()}"
        command = ["cc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", unfinished, SOURCE]
        subprocess.run(command, check=True)
        unfinished.rename(path)
    return path


class _Driver(nvidia.CudaDriver):
    """Triton's driver for a GPU, with what torch would tell about the GPU."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_device_capability = lambda device: capability


@functools.cache
def start() -> Driver:
    """Load the stand-in and return it."""
    path = library()
    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)
    loaded = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return Driver(loaded)


def use(arch: str) -> None:
    """Let the back-ends serve CPU tensors as if they were on a GPU of an architecture, such as "sm_90"."""
    number = int(arch.removeprefix("sm_"))
    driver.set_active(_Driver((number // 10, number % 10)))
    gpu = Gpu(arch, 132, "a stand-in")
    device.TARGETS[CPU] = device.Target(gpu, contextlib.nullcontext, lambda: 0, lambda: False)
