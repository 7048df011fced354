"""The kernels of csrc/cuda/sm90 compiled for the host, on the emulated GPU of sm90_machine/, and called as the back-end
calls them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.paths import ROOT, SUPPORT
from torch import Tensor

from lora_kernels.backends import workspace
from lora_kernels.backends.cuda import launch
from lora_kernels.core import dropout
from lora_kernels.evidence import identity
from lora_kernels.evidence.identity import Identity
from lora_kernels.plans.sm90 import BY_RULE, Sm90Plan

SM90 = ROOT / "csrc" / "cuda" / "sm90"
MACHINE = SUPPORT / "sm90_machine"
KEEP_MASK = MACHINE / "keep_mask.cpp"
EMULATOR = [MACHINE / f"emulator{part}.cpp" for part in ("", "_backward")]
HEADERS = [MACHINE / f"{part}.h" for part in ("machine", "ptx", "wgmma")]

IDENTITY = Identity("Emulated GPU", "sm_90", 4, "580.65", torch.__version__, None, None, "abc", "def")

_POINTER, _INT, _LONG, _FLOAT, _BOOL = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_bool


class Operands(ctypes.Structure):
    _fields_ = [
        *((field, _INT) for field in ("device", "M", "N", "K", "R")),
        ("bf16", _BOOL),
        *((field, _POINTER) for field in ("x", "w", "a", "b")),
        *((field, _LONG) for field in ("ldx", "ldw", "lda", "ldb")),
        ("scale", _FLOAT),
        ("seed", _POINTER),
        ("threshold", ctypes.c_uint32),
        ("rescale", _FLOAT),
        *((field, _POINTER) for field in ("counters", "scratch", "stream")),
        ("columns", _INT),
        ("cluster", _INT),
    ]


class ForwardArgs(Operands):
    _fields_ = [(field, _POINTER) for field in ("bias", "y", "h")]


class BackwardArgs(Operands):
    _fields_ = [("dy", _POINTER), ("lddy", _LONG), *((field, _POINTER) for field in ("h", "dx", "da", "db"))]


class Workspace(ctypes.Structure):
    _fields_ = [("counters", ctypes.c_size_t), ("scratch", ctypes.c_size_t)]


def cuda_include() -> Path | None:
    """Return the folder of the CUDA toolkit's headers, whose types the kernels name, or None."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    for home in filter(None, homes):
        if Path(home, "include", "cuda_bf16.h").exists():
            return Path(home, "include")
    return None


def _gxx(*arguments: str | Path) -> None:
    subprocess.run(["g++", "-std=c++17", "-fPIC", *arguments], check=True, capture_output=True, text=True)


def compiled(sources: list[Path], watched: list[Path], flags: list[str]) -> Path:
    """Return a shared library that g++ builds from `sources`, once for each content of `watched`."""
    content = b"".join(path.read_bytes() for path in sorted(watched))
    digest = hashlib.sha256(content + " ".join(flags).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir(), f"lora_kernels_tests_{os.getuid()}", f"{sources[0].stem}_{digest}.so")
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            objects = [Path(folder, f"{source.stem}.o") for source in sources]
            jobs = [["-c", source, "-o", to] for source, to in zip(sources, objects, strict=True)]
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda job: _gxx(*flags, *job), jobs))
            _gxx("-shared", *objects, "-o", partial := Path(folder, target.name))
            partial.replace(target)
    return target


@functools.cache
def library() -> ctypes.CDLL:
    include = cuda_include()
    assert include is not None
    watched = [*EMULATOR, *HEADERS, *(path for path in SM90.iterdir() if path.suffix in (".h", ".cuh", ".cu"))]
    lib = ctypes.CDLL(str(compiled(EMULATOR, watched, ["-O2", "-U_FORTIFY_SOURCE", "-Wno-psabi", f"-I{include}"])))
    for direction in ("forward", "backward"):
        for function in (f"emulated_{direction}", f"emulated_{direction}_workspace"):
            getattr(lib, function).restype = ctypes.c_char_p
    return lib


@functools.cache
def keep_mask_library() -> ctypes.CDLL:
    watched = [KEEP_MASK, SM90.parent / "keep_mask.cuh", ROOT / "csrc" / "philox.h"]
    lib = ctypes.CDLL(str(compiled([KEEP_MASK], watched, ["-O2", "-Wall", "-Wextra", "-Werror"])))
    word = ctypes.c_uint32
    lib.keep_mask.argtypes = [_LONG, _LONG, word, word, _POINTER, _POINTER, ctypes.c_uint, ctypes.c_uint]
    return lib


def _ptr(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


class Device:
    """An emulated GPU with one stream, whose launches share a workspace. `resident` blocks run at a time, but at least
    one cluster. Every call takes `plan`."""

    def __init__(self, seed: int = 0, sms: int = 4, resident: int = 2, plan: Sm90Plan = BY_RULE):
        library().emulator_configure(seed, sms, resident)
        self.plan = plan
        self.counters = torch.zeros(1024, dtype=torch.int32)

    def _operands(self, args: Operands, M: int, x, w, a, b, scale: float, p: float, seed) -> None:
        args.M, (args.N, args.K), args.R = M, w.shape, a.shape[0]
        args.bf16 = w.dtype == torch.bfloat16
        args.x, args.w, args.a, args.b = map(_ptr, (x, w, a, b))
        args.ldx, args.ldw, args.lda, args.ldb = (0 if t is None else t.stride(0) for t in (x, w, a, b))
        args.scale, args.threshold, args.rescale = scale, dropout.threshold(p), dropout.rescale(p)
        args.seed = _ptr(seed)
        args.columns, args.cluster = self.plan

    def _run(self, direction: str, args: Operands) -> None:
        lib, needed = library(), Workspace()
        said = getattr(lib, f"emulated_{direction}_workspace")(ctypes.byref(args), ctypes.byref(needed))
        assert said == b"", said.decode()
        assert needed.counters <= self.counters.numel()
        scratch = torch.full((needed.scratch + 256,), 0xFF, dtype=torch.uint8)  # NaN in every type
        args.counters = self.counters.data_ptr()
        args.scratch = (scratch.data_ptr() + 255) // 256 * 256
        said = getattr(lib, f"emulated_{direction}")(ctypes.byref(args))
        assert said == b"", said.decode()
        assert not self.counters.any(), "a launch must leave the counters zero"

    def forward(self, x, w, a, b, bias, scale, p, seed, save_h=True) -> tuple[Tensor, Tensor | None]:
        y = torch.full((x.shape[0], w.shape[0]), float("nan"), dtype=x.dtype)
        h = torch.full((x.shape[0], a.shape[0]), float("nan"), dtype=x.dtype) if save_h else None
        args = ForwardArgs(bias=_ptr(bias), y=_ptr(y), h=_ptr(h))
        self._operands(args, x.shape[0], x, w, a, b, scale, p, seed)
        self._run("forward", args)
        return y, h

    def backward(self, dy, x, w, a, b, h, scale, p, seed, need_dx=True, need_da=True, need_db=True):
        def empty(shape, dtype, needed):
            return torch.full(shape, float("nan"), dtype=dtype) if needed else None

        dx = empty((dy.shape[0], w.shape[1]), dy.dtype, need_dx)
        da, db = empty(a.shape, a.dtype, need_da), empty(b.shape, b.dtype, need_db)
        args = BackwardArgs(dy=_ptr(dy), lddy=dy.stride(0), h=_ptr(h), dx=_ptr(dx), da=_ptr(da), db=_ptr(db))
        self._operands(args, dy.shape[0], x, w, a, b, scale, p, seed)
        self._run("backward", args)
        return dx, da, db


class Extension:
    """A stand-in for the extension lora_kernels._cuda that launches in the emulator."""

    def __init__(self) -> None:
        self.device = Device(11)
        self.Sm90Forward = lambda **operands: self.call("forward", ForwardArgs, operands)
        self.Sm90Backward = lambda **operands: self.call("backward", BackwardArgs, operands)

    def keep_mask(self, device, M, K, bf16, threshold, seed, mask, stream) -> None:
        """Run the kernel on a small grid, so that each thread writes several groups."""
        assert K % 8 == mask % 16 == 0
        one = 0x3F80 if bf16 else 0x3C00
        keep_mask_library().keep_mask(M, K, one, threshold, seed, mask, 3, 32)

    def call(self, direction: str, kind: type[Operands], operands: dict) -> SimpleNamespace:
        args = kind(**{field: value or 0 for field, value in operands.items()})

        def results(**pointers: int) -> None:
            for field, value in pointers.items():
                setattr(args, field, value)

        def workspace() -> tuple[int, int]:
            needed = Workspace()
            function = getattr(library(), f"emulated_{direction}_workspace")
            assert function(ctypes.byref(args), ctypes.byref(needed)) == b""
            return needed.counters, needed.scratch

        def launch(counters: int, scratch: int) -> None:
            args.counters, args.scratch = counters, scratch
            assert getattr(library(), f"emulated_{direction}")(ctypes.byref(args)) == b""

        return SimpleNamespace(results=results, workspace=workspace, launch=launch)


def serve_cpu(monkeypatch: pytest.MonkeyPatch, extension: Any = None) -> Any:
    """Let the cuda back-end run on CPU tensors, in the emulator or by another `extension`, which is returned."""
    extension = Extension() if extension is None else extension
    monkeypatch.setattr(launch, "extension", lambda: extension)
    monkeypatch.setattr(workspace, "_blocks", {})
    monkeypatch.setattr(workspace, "_by_stream", {})
    monkeypatch.setattr(identity, "identify", lambda device: IDENTITY)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return extension
