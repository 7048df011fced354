"""The build of the native modules with ninja: `_C` (CPU) always, `_cuda` where it is asked for. It needs no torch.

Whatever cannot be compiled is left out, with a message and a record in the package: an instruction set that the
compiler does not know, `_C` where no compiler works, `_cuda` where nvcc fails.

Environment:
    CXX                           the C++ compiler (default: the first of c++, g++, clang++ that works)
    CXXFLAGS, LDFLAGS             more flags for compiling and linking `_C`, after ours
    LORA_KERNELS_CUDA             0 (default): no `_cuda`; auto: build it if nvcc is found; 1: fail without it
    CUDA_HOME, CUDA_PATH          the CUDA toolkit whose bin/nvcc is used (default: see `native_nvcc.wanted_nvcc`)
    LORA_KERNELS_SANITIZE         sanitizers of `_C`, such as address,undefined: for tests, which preload libasan
    LORA_KERNELS_REQUIRE_NATIVE   1: fail where `_C` cannot be built; otherwise the package installs as pure Python
    MAX_JOBS                      the number of files that ninja compiles at a time
"""

from __future__ import annotations

import os
import shlex
import sys
import sysconfig
from pathlib import Path

from native_compiler import CXX_FLAGS, PATHS, Compiler, error_line, find_compiler
from native_ninja import Ninja
from native_nvcc import cuda_choice, source_hash, wanted_nvcc
from native_record import Record, tell
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent.parent
ADVICE = "Install a C++17 compiler with Python's headers (Debian: apt install g++ python3-dev), then: "
ADVICE += "pip install --no-cache-dir --force-reinstall --no-deps lora_kernels"


def _sanitizers() -> list[str]:
    """Return the flags of the sanitizers that were asked for.

    -O1, and no checks of what ASan finds too, because the files of vector instructions would take minutes.
    """
    names = os.environ.get("LORA_KERNELS_SANITIZE")
    if not names:
        return []
    return [f"-fsanitize={names}", "-fno-sanitize=null,object-size,vptr", "-fno-sanitize-recover=all", "-O1", "-g1"]


def _environment(name: str) -> list[str]:
    """Return the flags in a variable, each quoted for the shell that ninja calls."""
    return [shlex.quote(flag) for flag in shlex.split(os.environ.get(name, ""))]


def _without(what: str) -> None:
    """Say that the package is built without its CPU kernels. SystemExit where they are required."""
    if os.environ.get("LORA_KERNELS_REQUIRE_NATIVE") == "1":
        raise SystemExit(f"LORA_KERNELS_REQUIRE_NATIVE=1, but {what}. {ADVICE}")
    tell(f"WARNING: lora_kernels installs without its native kernels: {what}. {ADVICE}")


def extensions() -> list[Extension]:
    """Return the modules to build: none without a C++ compiler."""
    nvcc = wanted_nvcc()
    compiler, _ = find_compiler()
    if compiler is None:
        return []
    names = ["_C"] + (["_cuda"] if nvcc else [])
    return [Extension(f"lora_kernels.{name}", sources=[]) for name in names]


def _pure(folder: Path) -> None:
    """Tell why there is no native module, and keep the reason in the package."""
    why = find_compiler()[1]
    _without(f"there is no working C++17 compiler with Python headers ({why})")
    Record(modules={"_C": why, "_cuda": why}).write(folder)


class BuildPython(build_py):
    """A build_py that tells and keeps the reason why there is no native module, where there is none."""

    def run(self) -> None:
        """Copy the Python files. Without native modules, write the record."""
        super().run()
        if not self.distribution.ext_modules:
            _pure((ROOT if self.editable_mode else Path(self.build_lib)) / "lora_kernels")


class BuildNative(build_ext):
    """A build_ext that compiles with ninja: flags differ from file to file, and a second build is incremental."""

    def run(self) -> None:
        """Build all modules of `extensions`, and write the record beside them."""
        compiler, _ = find_compiler()
        if not self.extensions or compiler is None:
            _pure(Path(self.get_ext_fullpath("lora_kernels._C")).parent)
            return
        targets = {e.name.split(".")[1]: Path(self.get_ext_fullpath(e.name)).resolve() for e in self.extensions}
        for target in targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)
        nvcc = wanted_nvcc() if "_cuda" in targets else None
        ninja = Ninja(Path(self.build_temp).resolve(), compiler.command, nvcc, self.verbose > 1)
        record = Record(compiler.version, dict.fromkeys(targets, ""))
        cuda = [self._cuda(ninja, str(targets["_cuda"]))] if nvcc else []
        rest, paths = self._objects(ninja, compiler)
        every_object = [*rest, *(o for objects in paths.values() for o in objects)]
        if not ninja.run([*every_object, *cuda]):
            record.left_out = self._faults(ninja, paths)
            if cuda and (why := ninja.fault(cuda)):
                record.modules["_cuda"] = error_line(why)
        for path, why in record.left_out.items():
            text = f"WARNING: lora_kernels is built without its {path} kernels: {compiler.version} cannot compile them"
            tell(f"{text} ({why})")
        if why := self._link(ninja, compiler, str(targets["_C"]), rest, paths, record):
            record.modules["_C"] = error_line(why)
            _without(f"the CPU kernels could not be compiled ({error_line(why)})")
        if why := record.modules.get("_cuda"):
            if cuda_choice() == "1":
                raise SystemExit(f"LORA_KERNELS_CUDA=1, but the CUDA kernels could not be compiled: {why}")
            tell(f"WARNING: lora_kernels installs without its CUDA kernels: {why}")
        record.modules.setdefault("_cuda", "it is built where LORA_KERNELS_CUDA=1 asks for it")
        record.write(targets["_C"].parent)
        failed = {name for name, why in record.modules.items() if why}
        self.extensions = [e for e in self.extensions if e.name.split(".")[1] not in failed]

    def _includes(self) -> list[str]:
        import pybind11

        # -isystem keeps the compiler quiet about warnings in these headers.
        return ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]

    def _common(self, compiler: Compiler) -> list[str]:
        x86 = ["-DLK_X86"] if compiler.is_x86 else []
        return [*CXX_FLAGS, *self._includes(), *x86, *_environment("CXXFLAGS"), *_sanitizers()]

    def _objects(self, ninja: Ninja, compiler: Compiler) -> tuple[list[str], dict[str, list[str]]]:
        """Add the steps of the objects of `_C` but one. Return those that it needs, and those of each instruction set.

        Tables of kernels get the flags of their instruction sets; other files get none.
        """
        cpu, common = ROOT / "csrc" / "cpu", self._common(compiler)
        baseline = str(cpu / "kernels.cpp")
        objects = [ninja.build("cxx", [baseline], "kernels_baseline.o", common)]
        paths = {}
        for path, (sources, flags) in PATHS.items() if compiler.is_x86 else ():
            steps = [(str(cpu / source), f"{Path(source).stem}_{path}.o") for source in sources]
            paths[path] = [ninja.build("cxx", [source], target, [*common, *flags]) for source, target in steps]
        apart = {"isa.cpp", "kernels.cpp", *(source for sources, _ in PATHS.values() for source in sources)}
        for source in [ROOT / "csrc" / "bindings.cpp", *sorted(cpu.glob("*.cpp"))]:
            if source.name not in apart:
                objects.append(ninja.build("cxx", [str(source)], f"{source.stem}.o", [*common, *compiler.openmp]))
        return objects, paths

    def _faults(self, ninja: Ninja, paths: dict[str, list[str]]) -> dict[str, str]:
        """Return why instruction sets are left out: each whose objects cannot be compiled, and what builds upon it."""
        faults = {path: error_line(why) for path, objects in paths.items() if (why := ninja.fault(objects))}
        if "avx512" in faults and "avx512_bf16" in paths:
            faults.setdefault("avx512_bf16", "it builds upon avx512")
        return faults

    def _link(
        self,
        ninja: Ninja,
        compiler: Compiler,
        target: str,
        objects: list[str],
        paths: dict[str, list[str]],
        record: Record,
    ) -> str:
        """Compile the choice between the instruction sets that are there, and link `_C`. Return what went wrong."""
        there = {path: each for path, each in paths.items() if path not in record.left_out}
        flags = [*self._common(compiler), *(f"-DLK_HAS_{path.upper()}" for path in there)]
        isa = ninja.build("cxx", [str(ROOT / "csrc" / "cpu" / "isa.cpp")], "isa.o", flags)
        every = [*objects, isa, *(o for each in there.values() for o in each)]
        link = [*_environment("LDFLAGS"), *self._link_flags(), *compiler.openmp_link]
        ninja.build("link", every, target, link)
        return "" if ninja.run([target]) else ninja.fault([target])

    def _cuda(self, ninja: Ninja, target: str) -> str:
        """Add the steps of `_cuda`: every .cu and .cpp under csrc/cuda. Return the target."""
        # nvcc also compiles the bindings and links, because it knows where its headers and libraries are.
        folder = ROOT / "csrc" / "cuda"
        common = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *self._includes()]
        # Not -arch=sm_90a: it also compiles for compute_90, which has neither wgmma nor setmaxnreg.
        device = [*common, "--expt-relaxed-constexpr", "-lineinfo", "-gencode=arch=compute_90a,code=sm_90a"]
        host = [*common, "-DNDEBUG", f"'-DLK_SOURCES=\"{source_hash()}\"'"]
        objects = []
        for source in sorted([*folder.rglob("*.cu"), *folder.rglob("*.cpp")]):
            name = "cuda_" + "_".join(source.relative_to(folder).parts) + ".o"
            objects.append(ninja.build("nvcc", [str(source)], name, device if source.suffix == ".cu" else host))
        return ninja.build("nvlink", objects, target, ["-cudart=static", "-Xlinker=--gc-sections,-s"])

    def _link_flags(self) -> list[str]:
        if sanitizers := _sanitizers():
            return sanitizers
        # OpenMP's functions are left open (see `native_compiler._openmp`). With `now` a module that does not find them
        # fails as it is imported, where the automatic choice can still go to another back-end, and not at a call.
        linux = ["-Wl,-z,now", "-Wl,--gc-sections", "-s"]
        return ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else linux
