"""The build asks the compiler what it can do, leaves out what it cannot compile, and keeps the reason."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT
from support.stand_in_compiler import stand_in

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not in a source tree"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here"),
]
ISA = ROOT / "csrc" / "cpu" / "isa.cpp"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "ARCHFLAGS", "LORA_KERNELS_REQUIRE_NATIVE", "LORA_KERNELS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(ROOT / "csrc")
    return importlib.import_module("native_compiler")


def build(folder: Path, cxx: str, **more: str) -> tuple[subprocess.CompletedProcess[str], dict, list[str]]:
    """Build `_C` with a compiler into a folder. Return the run, the record, and the objects that were linked."""
    pytest.importorskip("pybind11")
    command = ["setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LORA_KERNELS")} | {"CXX": cxx} | more
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    record = folder / "lora_kernels" / "_built.json"
    read = json.loads(record.read_text()) if record.exists() else {}
    words = (Path(cxx).parent / "words").read_text().splitlines()
    return done, read, [line for line in words if "-shared" in line]


@pytest.mark.parametrize(
    ("refuses", "left_out"),
    [
        ("-mavx512bf16", {"avx512_bf16"}),
        pytest.param("-mavx512*", {"avx512", "avx512_bf16"}, marks=pytest.mark.slow),
        pytest.param("-mf16c", {"avx2", "avx512", "avx512_bf16"}, marks=pytest.mark.slow),
    ],
)
def test_an_instruction_set_that_the_compiler_lacks_is_left_out(
    refuses: str, left_out: set[str], compiler: ModuleType, tmp_path: Path
) -> None:
    """`_C` is linked without its objects. The log and the record tell the compiler's own reason."""
    more = {"CXXFLAGS": "-g '-DA=b  c'", "LDFLAGS": "-Wl,-rpath,/opt/lib"}
    done, record, links = build(tmp_path, stand_in(tmp_path, refuses), **more)
    if not compiler.find_compiler()[0].is_x86:
        pytest.skip("instruction sets of x86-64")
    assert done.returncode == 0, done.stderr
    assert set(record["left_out"]) == left_out and record["modules"]["_C"] == ""
    assert all(
        "unrecognized command line option" in why or path == "avx512_bf16" for path, why in record["left_out"].items()
    )
    for path in compiler.PATHS:
        assert (f"_{path}.o" in links[0].replace("avx512_bf16.o", "" if path == "avx512" else "avx512_bf16.o")) == (
            path not in left_out
        )
        assert (f"built without its {path} kernels" in done.stderr) == (path in left_out)
    words = (tmp_path / "words").read_text().splitlines()
    (isa,) = [line for line in words if str(ISA) in line]
    assert {path for path in compiler.PATHS if f"-DLK_HAS_{path.upper()}" in isa.split()} == {
        *compiler.PATHS
    } - left_out


def test_what_the_compiler_cannot_compile_at_all_leaves_a_package_without_kernels(
    compiler: ModuleType, tmp_path: Path
) -> None:
    refuses = "*bindings.cpp"
    done, record, links = build(tmp_path, stand_in(tmp_path, refuses))
    assert done.returncode == 0 and not links
    assert "unrecognized" in record["modules"]["_C"] and "installs without its native kernels" in done.stderr


@pytest.mark.slow
def test_kernels_that_are_required_and_cannot_be_compiled_end_the_build(compiler: ModuleType, tmp_path: Path) -> None:
    done, *_ = build(tmp_path, stand_in(tmp_path, "*bindings.cpp"), LORA_KERNELS_REQUIRE_NATIVE="1")
    assert done.returncode != 0 and "LORA_KERNELS_REQUIRE_NATIVE=1, but the CPU kernels could not" in done.stderr


STUBS = """
#include "cpu/isa.h"
#include <cstdio>
namespace lk::cpu {
#define TABLE(isa) const Kernels& kernels_##isa() { static Kernels k{}; k.name = #isa; return k; }
TABLE(baseline)
#if defined(LK_HAS_AVX2)
TABLE(avx2)
#endif
#if defined(LK_HAS_AVX512)
TABLE(avx512)
#endif
#if defined(LK_HAS_AVX512_BF16)
const LowRank& low_rank_avx512_bf16() { static LowRank k{}; return k; }
const QuantPairs& quant_avx512_bf16() { static QuantPairs k{}; return k; }
const Gemm& gemm_avx512_bf16() { static Gemm k{}; return k; }
#endif
}
int main() {
  for (const auto& p : lk::cpu::paths()) std::printf("%s %d %d\\n", p.name, p.table != nullptr, p.processor);
  std::printf("%s\\n", lk::cpu::kernels().name);
}
"""


@pytest.mark.parametrize(
    "there",
    [
        ["avx2"],
        ["avx512_bf16"],
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["avx512", "avx512_bf16"], marks=pytest.mark.slow),
    ],
)
def test_the_choice_of_kernels_works_without_some(there: list[str], compiler: ModuleType, tmp_path: Path) -> None:
    """The tables that are not there are not named, so that the module links. The best of the rest is in use."""
    found, why = compiler.find_compiler()
    assert found is not None, why
    source = tmp_path / "stubs.cpp"
    source.write_text(STUBS)
    flags = ["-std=c++17", f"-I{ROOT / 'csrc'}", *(["-DLK_X86"] if found.is_x86 else [])]
    flags += [f"-DLK_HAS_{path.upper()}" for path in there]
    subprocess.run([*found.command, *flags, str(ISA), str(source), "-o", str(tmp_path / "a")], check=True, timeout=60)
    *lines, used = subprocess.run([tmp_path / "a"], capture_output=True, text=True, check=True).stdout.splitlines()
    paths = {name: (compiled == "1", here == "1") for name, compiled, here in map(str.split, lines)}
    if found.is_x86:
        wanted = {*there} if "avx512" in there else {*there} - {"avx512_bf16"}
        assert {name for name, (compiled, _) in paths.items() if compiled} == {"baseline", *wanted}
        assert list(paths) == ["avx512_bf16", "avx512", "avx2", "baseline"]
    assert used == next(name for name, (compiled, here) in paths.items() if compiled and here)


def test_on_windows_no_compiler_is_taken(compiler: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    found, why = compiler.find_compiler()
    assert found is None and "Windows" in why and "WSL" in why


@pytest.mark.parametrize(
    ("platform", "accepts", "clang", "links", "flags"),
    [
        ("linux", "-fopenmp", False, True, (["-fopenmp"], [])),  # gcc: torch's libgomp, found as the module is loaded
        ("linux", "-fopenmp", True, True, (["-fopenmp"], ["-fopenmp"])),  # clang calls libomp, a runtime of its own
        ("linux", "-fopenmp", True, False, ([], [])),  # ... if it is installed
        ("linux", "", False, True, ([], [])),
        ("darwin", "-Xpreprocessor -fopenmp", True, False, (["-Xpreprocessor", "-fopenmp"], [])),  # torch's libomp
        ("darwin", "", True, True, ([], [])),
    ],
)
def test_openmp_is_torchs_where_it_can_be(
    platform: str,
    accepts: str,
    clang: bool,
    links: bool,
    flags: tuple[list[str], list[str]],
    compiler: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fault(command: list[str], source: str, link: bool = False) -> str:
        if "__clang__" in source:
            return "clang" if clang else ""
        words = " ".join(command[1:])
        return "" if words == accepts and words and (links or not link) else "unsupported option '-fopenmp'"

    monkeypatch.setattr(compiler, "fault_of", fault)
    monkeypatch.setattr(sys, "platform", platform)
    assert compiler._openmp(["c++"]) == flags


def test_macos_names_the_architecture_to_compile_for(
    compiler: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[list[str]] = []
    monkeypatch.setattr(compiler, "fault_of", lambda command, *_, **__: said.append(command) or "")
    monkeypatch.setattr(compiler, "_version", lambda command: "Apple clang")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("ARCHFLAGS", "-arch arm64")
    found, _ = compiler.find_compiler()
    assert found.command == ["c++", "-arch", "arm64"] and all(each[:3] == found.command for each in said)


def test_the_line_that_tells_most_is_the_first_error(compiler: ModuleType) -> None:
    said = "[1/2] c++ x.cpp\nFAILED: [code=1] x.o\nx.cpp: In function:\nx.cpp:1:2: error: no such thing\nmore\n"
    assert compiler.error_line(said) == "x.cpp:1:2: error: no such thing"
    assert compiler.error_line("") == "it said nothing"
    assert compiler.error_line("c++: not found\n") == "c++: not found"
