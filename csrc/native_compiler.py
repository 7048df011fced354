"""The C++ compiler of the build: which one works, what it compiles for, and its flags."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DNDEBUG"]
# clang says of each flag below that it does not know it, unless it is told not to. gcc never does.
CXX_FLAGS += ["-Wno-psabi", "-Wno-unknown-warning-option"]
AVX512 = ["-DLK_ISA_AVX512", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
# gcc 12 warns about uninitialised variables in its own <avx512fintrin.h> (GCC bug 105593).
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
PATHS = {
    "avx2": (["kernels.cpp"], ["-DLK_ISA_AVX2", "-mavx2", "-mfma", "-mf16c"]),
    "avx512": (["kernels.cpp"], AVX512),
    "avx512_bf16": (["low_rank_bf16.cpp", "quant_bf16.cpp", "gemm_bf16.cpp"], [*AVX512, "-mavx512bf16"]),
}
"""The instruction sets of x86-64 beside the baseline: the sources that are compiled for each, and its flags."""
WINDOWS = (
    "the kernels are written for gcc and clang, and a Python for Windows takes neither. There the package is pure "
    "Python; in WSL, which is Linux, it has its kernels"
)


@dataclass(frozen=True)
class Compiler:
    """A compiler that can build a Python extension."""

    command: list[str]
    version: str
    """The first line of what it says of itself."""
    is_x86: bool
    """Whether it compiles for x86-64."""
    openmp: list[str]
    """The flags with which it compiles OpenMP, or none where it cannot."""
    openmp_link: list[str]
    """The flags of the link that OpenMP needs: see `_openmp`."""


def fault_of(command: list[str], source: str, link: bool = False) -> str:
    """Return "" if the compiler accepts the source (and links it to a library where `link`), else its message."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        how = ["-shared", "-fPIC"] if link else ["-c"]
        try:
            done = subprocess.run([*command, *how, str(path), "-o", f"{path}.o"], capture_output=True, text=True)
        except FileNotFoundError:
            return "not found"
        except OSError as error:
            return str(error)
        return "" if done.returncode == 0 else (done.stderr or f"exit status {done.returncode}").strip()


def error_line(text: str) -> str:
    """Return the line that tells most of what a compiler has printed: the first with the word error, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in lines if "error" in line.lower() and not line.startswith("FAILED")), lines[-1])


def find_compiler() -> tuple[Compiler | None, str]:
    """Return (a compiler, ""), or (None, the reason why none can build a Python extension here)."""
    if sys.platform == "win32":
        return None, WINDOWS
    commands = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    probe = "#include <Python.h>\n#include <vector>\nint main() { return 0; }\n"
    reasons = []
    for name in commands:
        # macOS: Python's own build tools name the architectures to compile for in ARCHFLAGS.
        arch = shlex.split(os.environ.get("ARCHFLAGS", "")) if sys.platform == "darwin" else []
        command = [*shlex.split(name), *arch]
        said = fault_of([*command, "-std=c++17", f"-I{sysconfig.get_path('include')}"], probe)
        if said:
            reasons.append(f"{name}: {error_line(said)}")
            continue
        is_x86 = not fault_of(command, "#if !defined(__x86_64__)\n#error another architecture\n#endif\n")
        return Compiler(command, _version(command), is_x86, *_openmp(command)), ""
    return None, "; ".join(reasons)


def _version(command: list[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return (done.stdout.splitlines() or [" ".join(command)])[0]


def _openmp(command: list[str]) -> tuple[list[str], list[str]]:
    """Return (the flags to compile OpenMP with, the flags to link it with), both empty where it is not to be had.

    A process should have one OpenMP runtime, because the threads of two get in each other's way. torch brings one
    under a name that differs from build to build, and lends its symbols to all that is loaded later. Where our code
    calls the same runtime, the module is linked to none: on Linux gcc's libgomp, on macOS LLVM's libomp. Only clang
    on Linux needs libomp, which is then a second runtime beside torch's libgomp.
    """
    source = "int sum(int n) { int s = 0;\n#pragma omp parallel for reduction(+ : s)\n"
    source += "for (int i = 0; i < n; ++i) s += i;\nreturn s; }\n#ifndef _OPENMP\n#error no OpenMP\n#endif\n"
    if sys.platform == "darwin":
        flags = ["-Xpreprocessor", "-fopenmp"]  # Apple's driver refuses -fopenmp, its compiler takes it
        return ([], []) if fault_of([*command, *flags], source) else (flags, [])
    if fault_of([*command, "-fopenmp"], source):
        return [], []
    if fault_of(command, "#if defined(__clang__)\n#error clang\n#endif\n"):
        return ([], []) if fault_of([*command, "-fopenmp"], source, link=True) else (["-fopenmp"], ["-fopenmp"])
    return ["-fopenmp"], []
