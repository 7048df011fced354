"""Fill a folder with compiled Triton kernels, without a GPU, for another machine whose GPU you have for minutes only.

    python scripts/gpu_triton_cache.py FOLDER [--arch sm_90] [--multiprocessors 132] [--jobs N]
                                              [--python PYTHON --wheel TRITON.whl]

The kernels are those of `composite` and `triton` for the sizes that `verify` judges and the bench times. They are
compiled as Triton compiles them at their first call, so that they are found under the same keys. A key is made of the
kernel's source, the types and alignment of its arguments, the options, the architecture, the assembler's version, the
environment variables that change code, and the files of Triton itself, with its native library.

That library differs from one version of Python to another. For a machine with another Python than this one, --python
names a Python of that version, with its headers, and --wheel the wheel of Triton that is installed there, of the same
version as here: `pip download triton==... --no-deps --python-version 3.12 --only-binary=:all:`.

Triton also compiles C code that talks to the driver, and some versions compile a launcher for each kernel. These are
put into the folder too, built with the headers of that Python. They are linked against a driver whose functions do
nothing, because there may be none here.

Triton keeps absolute paths in its cache. A folder that was moved is made usable by `relocate`. Whatever is missing or
has another key is only compiled again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("composite", "triton")
KEPT = (".cubin", ".hsaco", ".json")
"""The files of a kernel that a launch reads. The intermediate languages take four fifths of the space."""


class Problem(NamedTuple):
    """A layer whose kernels are compiled: its sizes, types, and what else they depend on."""

    M: int
    K: int
    N: int
    R: int
    dtype: str
    adapter_dtype: str
    p: float
    bias: bool
    training: bool


def relocate(folder: Path) -> int:
    """Make a cache that was moved here usable, and return its number of kernels. Triton looks for the files of a kernel
    under the absolute paths that it wrote beside them."""
    count = 0
    for group in folder.glob("*/__grp__*.json"):
        names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        here = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
        beside = group.with_name(f".{group.name}")
        beside.write_text(json.dumps({"child_paths": here}), encoding="utf-8")
        beside.replace(group)
        count += 1
    return count


def count(folder: Path) -> int:
    """Return the number of kernels in a cache."""
    return len(list(folder.glob("*/__grp__*.json")))


def strip(folder: Path) -> None:
    """Delete what no launch reads."""
    for kernel in folder.iterdir():
        if not any(kernel.glob("__grp__*.json")):
            continue
        for path in kernel.iterdir():
            if path.suffix not in KEPT:
                path.unlink()
    relocate(folder)


def key_of_wheel(wheel: Path) -> str:
    """Return what Triton's own `triton_key` returns where a wheel is installed.

    Raises ValueError where the wheel is of another version than the Triton of this Python, which compiles the kernels.
    """
    import triton
    from triton.runtime import cache

    installed = Path(triton.__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as packed:
        names = [name for name in packed.namelist() if name.startswith("triton/")]
        names = [name for name in names if name.endswith(".py") or name.startswith("triton/_C/libtriton")]
        for name in (name for name in names if name.endswith(".py")):
            mine = installed.parent / name
            if not mine.exists() or mine.read_bytes() != packed.read(name):
                raise ValueError(f"{wheel.name} is not a wheel of Triton {triton.__version__}: {name} differs")
        packed.extractall(folder, names)
        plain = getattr(cache.triton_key, "__wrapped__", cache.triton_key)
        there = {**cache.__dict__, "__file__": str(Path(folder) / "triton" / "runtime" / "cache.py")}
        return str(types.FunctionType(plain.__code__, there)())


def problems() -> list[Problem]:
    """Return the layers that `verify` judges and those that the bench times on a GPU."""
    from lora_kernels.bench import shapes
    from lora_kernels.tools.verify.cases import CASES

    found = []
    for shape in (*shapes.SUITES["llama"]["cuda"], *shapes.SUITES["sweep"]["cuda"]):
        types = _name(shape.dtype), _name(shape.adapters)
        for p in dict.fromkeys(cell.p for cell in shape.cells):
            found.append(Problem(shape.M, shape.K, shape.N, shape.R, *types, p, shape.bias, shape.training))
    for size, p in CASES:
        for adapters in ("bfloat16", "float32"):
            found.append(Problem(*size, "bfloat16", adapters, p, False, True))
    return found


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


class Machine(NamedTuple):
    """The machine that kernels are compiled for."""

    arch: str
    multiprocessors: int
    triton_key: str | None = None
    """What `triton_key` returns there. None: the same as here."""
    suffix: str = str(sysconfig.get_config_var("EXT_SUFFIX"))
    """The end of the names of its Python's native modules."""
    include: str = sysconfig.get_path("include")
    """The folder of its Python's headers, on this machine."""


def compile_problems(some: Sequence[Problem], machine: Machine) -> list[str]:
    """Compile the kernels of a forward and a backward of each problem, and return what could not be compiled.

    The operands are tensors without memory. `TRITON_CACHE_DIR` says where the kernels are kept.
    """
    with _without_gpu(machine):
        return [fault for problem in some for name in BACKENDS if (fault := _compile(problem, name))]


@contextlib.contextmanager
def _without_gpu(machine: Machine) -> Iterator[None]:
    """Let Triton compile for a GPU that is not there, and let launches end when they are compiled."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import cache, driver

    from lora_kernels.backends import workspace
    from lora_kernels.backends.triton import device
    from lora_kernels.plans.tiles import Gpu

    class Driver:
        """What compiling asks a driver for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def compile_only(frame: device.Frame, **others: Any) -> None:
        if frame.programs:
            build(frame.kernel.warmup(grid=(1,), **frame.arguments, **others, **frame.options))

    arch, meta, gpu = machine.arch, torch.device("meta"), Gpu(machine.arch, machine.multiprocessors)
    with mock.patch.object(device.Frame, "run", compile_only), contextlib.ExitStack() as stack:
        if machine.triton_key is not None:
            stack.enter_context(mock.patch.object(cache, "triton_key", lambda: machine.triton_key))
        build = stack.enter_context(_c_code(machine))
        stack.enter_context(mock.patch.object(driver, "_active", Driver()))
        for name in ("_blocks", "_by_stream"):  # counters without memory are of no use to later launches
            stack.enter_context(mock.patch.object(workspace, name, {}))
        device.TARGETS[meta] = device.Target(gpu, contextlib.nullcontext, lambda: 0, lambda: False)
        try:
            yield
        finally:
            del device.TARGETS[meta]


@contextlib.contextmanager
def _c_code(machine: Machine) -> Iterator[Callable[[Any], None]]:
    """Let Triton compile its C code for the Python of a machine, and yield a function that builds the launcher of a
    compiled kernel. On an AMD GPU that function does nothing."""
    from triton import knobs
    from triton.backends.nvidia import driver
    from triton.runtime import build
    from triton.runtime import driver as active

    if not machine.arch.startswith("sm_"):
        yield lambda kernel: None
        return

    class Sysconfig:
        """The module, as it is in the other Python."""

        def get_config_var(self, name: str) -> Any:
            return machine.suffix if name == "EXT_SUFFIX" else sysconfig.get_config_var(name)

        def get_default_scheme(self) -> str:
            return "posix_prefix"

        def get_paths(self, scheme: str) -> dict[str, str]:
            return {"include": machine.include}

    def launcher(kernel: Any) -> None:
        with mock.patch.object(active, "_active", mock.MagicMock()):
            driver.CudaLauncher(kernel.src, kernel.metadata)

    with (
        tempfile.TemporaryDirectory() as libraries,
        mock.patch.object(build, "sysconfig", Sysconfig()),
        mock.patch.object(build, "_load_module_from_path", lambda name, path: mock.MagicMock()),
        knobs.nvidia.scope(),
    ):
        _stand_in_libcuda(Path(libraries), Path(driver.__file__).parent)
        knobs.nvidia.libcuda_path = libraries
        driver.library_dirs.cache_clear()
        driver.CudaUtils()
        try:
            yield launcher
        finally:
            driver.library_dirs.cache_clear()
            del driver.CudaUtils.instance


def _stand_in_libcuda(folder: Path, sources: Path) -> None:
    """Write a driver's library to link against. It has every function that Triton's C code names: a linker leaves a
    library out that gives nothing, and the modules would then not find the driver either where there is one."""
    text = "".join((sources / name).read_text(encoding="utf-8") for name in ("driver.c", "driver.py"))
    code = "".join(f"void {name}(void) {{}}\n" for name in sorted(set(re.findall(r"\bcu[A-Z]\w+", text))))
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, input=code, text=True, check=True)


def _compile(problem: Problem, backend: str) -> str | None:
    """Compile the kernels of a problem. Return what failed, or None."""
    import importlib

    import torch

    from lora_kernels.core.operands import Adapter, Base, Needs

    M, K, N, R, *types, p, bias, training = problem
    dtype, adapter_dtype = (getattr(torch, name) for name in types)
    empty = functools.partial(torch.empty, device="meta")
    x, dy, w = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype), empty(N, K, dtype=dtype)
    a, b = empty(R, K, dtype=adapter_dtype), empty(N, R, dtype=adapter_dtype)
    seed = empty((), dtype=torch.int64) if p else None
    base, adapter = Base(w, empty(N, dtype=dtype) if bias else None), Adapter(a, b, 0.75, p, seed)
    module = importlib.import_module(f"lora_kernels.backends.{backend}")
    try:
        _, hs = module.forward(x, [base], [adapter], [training])
        if training:
            module.backward([dy], x, [base._replace(bias=None)], [adapter], hs, Needs(True, (True,), (True,)))
    except Exception as error:  # the other kernels are still worth having
        return f"{backend} {problem}: {type(error).__name__}: {error}"
    return None


def fill(folder: Path, some: Sequence[Problem], machine: Machine, jobs: int) -> list[str]:
    """Compile the kernels of `some` problems into a folder, by several processes, and return what failed."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    shares = [list(some[i::jobs]) for i in range(jobs) if some[i::jobs]]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        faults = [
            fault for each in pool.map(functools.partial(compile_problems, machine=machine), shares) for fault in each
        ]
    strip(folder)
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to fill")
    parser.add_argument("--arch", default="sm_90", help="the GPU's architecture (default: sm_90)")
    parser.add_argument("--multiprocessors", type=int, default=132, metavar="N", help="those of the GPU (default: 132)")
    parser.add_argument(
        "--python", default=sys.executable, help="a Python of that machine's version (default: this one)"
    )
    parser.add_argument("--wheel", type=Path, help="the wheel of Triton on that machine, if its Python is not this one")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that compile at once"
    )
    args = parser.parse_args(argv)
    try:
        key = None if args.wheel is None else key_of_wheel(args.wheel)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        parser.error(f"--wheel: {error}")
    ask = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'), sysconfig.get_path('include'))"
    suffix, include = subprocess.check_output([args.python, "-c", ask], text=True).split()
    machine = Machine(args.arch, args.multiprocessors, key, suffix, include)
    faults = fill(args.folder, problems(), machine, args.jobs)
    for fault in faults:
        print(fault)
    kernels = count(args.folder)
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"{kernels} kernels, {size / 2**20:.1f} MiB, in {args.folder}; {len(faults)} passes could not be compiled")
    return int(not kernels)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
