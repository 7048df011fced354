"""The build of the native modules with ninja: `_C` (CPU) always, `_cuda` where nvcc is found. It needs no torch.

Environment:
    CXX                           the C++ compiler (default: the first of c++, g++, clang++ that works)
    LORA_KERNELS_CUDA             auto (default): build `_cuda` if nvcc is found; 0: never; 1: fail without nvcc
    CUDA_HOME, CUDA_PATH          the CUDA toolkit whose bin/nvcc is used (default: see `native_nvcc.wanted_nvcc`)
    LORA_KERNELS_SANITIZE         sanitizers of `_C`, such as address,undefined: for tests, which preload libasan
    LORA_KERNELS_REQUIRE_NATIVE   1: fail without a working C++ compiler; otherwise the package installs as pure Python
    MAX_JOBS                      the number of files that ninja compiles at a time
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from native_nvcc import source_hash, wanted_nvcc
from setuptools import Extension
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-DNDEBUG"]
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-DLK_ISA_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-DLK_ISA_AVX512", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
# gcc 12 warns about uninitialised variables in its own <avx512fintrin.h> (GCC bug 105593).
for _flags in (ISA_FLAGS["avx512"], ISA_FLAGS["avx512_bf16"]):
    _flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def _compiles(command: list[str], source: str) -> str:
    """Return '' if the compiler accepts the source, else its message."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        try:
            done = subprocess.run([*command, "-c", str(path), "-o", str(path) + ".o"], capture_output=True, text=True)
        except OSError as error:
            return str(error)
        return "" if done.returncode == 0 else (done.stderr or f"exit status {done.returncode}").strip()


def _sanitizers() -> list[str]:
    """Return the flags of the sanitizers that were asked for.

    -O1, and no checks of what ASan finds too, because the files of vector instructions would take minutes.
    """
    names = os.environ.get("LORA_KERNELS_SANITIZE")
    if not names:
        return []
    return [f"-fsanitize={names}", "-fno-sanitize=null,object-size,vptr", "-fno-sanitize-recover=all", "-O1", "-g1"]


def find_cxx() -> tuple[list[str], str]:
    """Return (compiler command, ''), or ([], the reason why no compiler can build a Python extension)."""
    commands = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    probe = "#include <Python.h>\n#include <vector>\nint main() { return 0; }\n"
    reasons = []
    for command in commands:
        said = _compiles([*command.split(), "-std=c++17", f"-I{sysconfig.get_path('include')}"], probe)
        if not said:
            return command.split(), ""
        reasons.append(f"{command}: {said.splitlines()[0]}")
    return [], "; ".join(reasons)


def extensions() -> list[Extension]:
    """Return the modules that this machine can build: none without a C++ compiler."""
    nvcc = wanted_nvcc()
    cxx, why = find_cxx()
    if not cxx:
        message = (
            f"no working C++17 compiler with Python headers ({why}). Install one (Debian: apt install g++ python3-dev) "
            "and reinstall to get the CPU and CUDA kernels"
        )
        if os.environ.get("LORA_KERNELS_REQUIRE_NATIVE") == "1":
            raise SystemExit(f"LORA_KERNELS_REQUIRE_NATIVE=1, but there is {message}")
        print(f"WARNING: lora_kernels installs without its native kernels: {message}.", file=sys.stderr)
        return []
    names = ["_C"] + (["_cuda"] if nvcc else [])
    return [Extension(f"lora_kernels.{name}", sources=[]) for name in names]


class Ninja:
    """One build.ninja. Every object has its own flags, and objects are linked into modules."""

    def __init__(self, folder: Path, cxx: list[str], nvcc: str | None):
        self.folder, self.lines = folder, []
        self.rule("cxx", f"{' '.join(cxx)} -MMD -MF $out.d $flags -c $in -o $out")
        self.rule("link", f"{' '.join(cxx)} -shared $in -o $out $flags", deps=False)
        if nvcc:
            self.rule("nvlink", f"{nvcc} -shared $in -o $out $flags", deps=False)
            self.rule("nvcc", f"{nvcc} -MMD -MF $out.d $flags -c $in -o $out")

    def rule(self, name: str, command: str, deps: bool = True) -> None:
        """Add a rule; with `deps` its command writes the headers that it read to `$out.d`."""
        self.lines += [f"rule {name}", f"  command = {command}"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if deps else []

    def build(self, rule: str, source: list[str], target: str, flags: list[str]) -> str:
        """Add a step that makes `target` from `source`, and return `target`."""
        escaped = [str(s).replace("$", "$$").replace(" ", "$ ").replace(":", "$:") for s in [target, *source]]
        self.lines += [f"build {escaped[0]}: {rule} {' '.join(escaped[1:])}", f"  flags = {' '.join(flags)}"]
        return target

    def run(self, verbose: bool) -> None:
        """Write the file and run ninja on it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([*command, *jobs, *(["-v"] if verbose else [])], cwd=self.folder, check=True)


class BuildNative(build_ext):
    """A build_ext that compiles with ninja: flags differ from file to file, and a second build is incremental."""

    def run(self) -> None:
        """Build all modules of `extensions`."""
        if not self.extensions:
            return
        cxx, _ = find_cxx()
        nvcc = wanted_nvcc() if any(e.name.endswith("._cuda") for e in self.extensions) else None
        folder = Path(self.build_temp).resolve()
        ninja = Ninja(folder, cxx, nvcc)
        for extension in self.extensions:
            target = str(Path(self.get_ext_fullpath(extension.name)).resolve())
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            if extension.name.endswith("._cuda"):
                self._cuda(ninja, target)
            else:
                self._cpu(ninja, target, cxx)
        ninja.run(self.verbose > 1)

    def _includes(self) -> list[str]:
        import pybind11

        # -isystem keeps the compiler quiet about warnings in these headers.
        return ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]

    def _cpu(self, ninja: Ninja, target: str, cxx: list[str]) -> None:
        """Add the steps of `_C`. Tables of kernels get the flags of their instruction sets; other files get none."""
        common = [*CXX_FLAGS, *self._includes(), *(["-DLK_X86"] if IS_X86 else []), *_sanitizers()]
        openmp = [] if _compiles([*cxx, "-fopenmp"], "#include <omp.h>\nint main() { return 0; }\n") else ["-fopenmp"]
        cpu = ROOT / "csrc" / "cpu"
        objects = []
        tables = [("kernels.cpp", isa) for isa in ("baseline", "avx2", "avx512")]
        tables += [(source, "avx512_bf16") for source in ("low_rank_bf16.cpp", "quant_bf16.cpp", "gemm_bf16.cpp")]
        for source, isa in tables if IS_X86 else tables[:1]:
            flags = [*common, *ISA_FLAGS[isa]]
            objects.append(ninja.build("cxx", [str(cpu / source)], f"{Path(source).stem}_{isa}.o", flags))
        compiled = {source for source, _ in tables}
        for source in [ROOT / "csrc" / "bindings.cpp", *sorted(cpu.glob("*.cpp"))]:
            if source.name not in compiled:
                objects.append(ninja.build("cxx", [str(source)], f"{source.stem}.o", [*common, *openmp]))
        ninja.build("link", objects, target, [*self._link_flags(), *openmp])

    def _cuda(self, ninja: Ninja, target: str) -> None:
        """Add the steps of `_cuda`: every .cu and .cpp under csrc/cuda."""
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
        ninja.build("nvlink", objects, target, ["-cudart=static", "-Xlinker=--gc-sections,-s"])

    def _link_flags(self) -> list[str]:
        if sanitizers := _sanitizers():
            return sanitizers
        return ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--gc-sections", "-s"]
