"""The build of the native modules follows its environment variables, does without a compiler, and fills the sdist."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not in a source tree")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("setuptools")
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "LORA_KERNELS_CUDA", "LORA_KERNELS_REQUIRE_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(ROOT / "csrc")
    return importlib.import_module("native_build")


def names(build: ModuleType) -> list[str]:
    return [extension.name for extension in build.extensions()]


def test_the_modules_to_build_depend_on_the_tools_found(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: (object(), ""))
    monkeypatch.setattr(build, "wanted_nvcc", lambda: "/opt/cuda/bin/nvcc")
    assert names(build) == ["lora_kernels._C", "lora_kernels._cuda"]
    monkeypatch.setattr(build, "wanted_nvcc", lambda: None)
    assert names(build) == ["lora_kernels._C"]


def test_without_a_compiler_the_package_is_pure_python(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning says what to do. It is an error where the kernels are required."""
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert build.extensions() == []
    build._pure(tmp_path)
    said = capsys.readouterr().err
    assert "installs without its native kernels" in said and "/no/such/compiler: not found" in said
    assert "apt install g++" in said and "--no-cache-dir --force-reinstall --no-deps" in said
    assert "/no/such/compiler" in json.loads((tmp_path / "_built.json").read_text())["modules"]["_C"]
    monkeypatch.setenv("LORA_KERNELS_REQUIRE_NATIVE", "1")
    with pytest.raises(SystemExit, match="LORA_KERNELS_REQUIRE_NATIVE=1, but there is no working"):
        build._pure(tmp_path)


def test_what_is_left_out_is_told_on_the_terminal_too(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip keeps the log of a build to itself."""
    record = importlib.import_module("native_record")
    (tmp_path / "tty").touch()
    monkeypatch.setattr(record, "TERMINAL", str(tmp_path / "tty"))
    record.tell("WARNING: without kernels")
    assert "without kernels" in capsys.readouterr().err and "without kernels" in (tmp_path / "tty").read_text()
    monkeypatch.setattr(record, "TERMINAL", str(tmp_path / "no" / "terminal"))
    record.tell("WARNING: without kernels")
    assert "without kernels" in capsys.readouterr().err


def test_a_long_build_tells_the_terminal_how_far_it_is(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ninja = importlib.import_module("native_ninja")
    (tmp_path / "tty").touch()
    monkeypatch.setattr(importlib.import_module("native_record"), "TERMINAL", str(tmp_path / "tty"))
    monkeypatch.setattr(ninja, "QUIET", 0.0)
    script = "print('[1/2] c++ a.cpp'); print('a warning'); print('[2/2] link'); raise SystemExit(1)"
    monkeypatch.setattr(ninja.Ninja, "_command", lambda self, targets: [sys.executable, "-c", script])
    steps = ninja.Ninja(tmp_path, ["c++"], None, verbose=False)
    assert not steps.run(["a.o"]) and steps.fault(["a.o"]).startswith("[1/2]")
    said = (tmp_path / "tty").read_text()
    assert "1 of 2 steps" in said or "2 of 2 steps" in said
    assert "a warning" in capsys.readouterr().out


def test_a_package_without_kernels_keeps_the_reason(build: ModuleType, tmp_path: Path) -> None:
    """A build of the Python files alone, as `pip install` makes it where there is no compiler."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    environment = os.environ | {"CXX": "/no/such/compiler"}
    environment.pop("LORA_KERNELS_REQUIRE_NATIVE", None)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60, env=environment)
    kept = json.loads((tmp_path / "lora_kernels" / "_built.json").read_text())
    assert "/no/such/compiler" in kept["modules"]["_C"] and kept["left_out"] == {}
    assert (tmp_path / "lora_kernels" / "__init__.py").exists()


def test_the_sdist_holds_all_that_a_build_needs(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        shipped = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {
        str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".h", ".cuh", ".py")
    }
    python = {str(p.relative_to(ROOT)) for p in (ROOT / "lora_kernels").rglob("*.py*") if p.suffix in (".py", ".pyi")}
    tests = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*.py")}
    others = {"conftest.py", "Makefile", "requirements-dev.txt", "mkdocs.yml", "README.md", "CHANGELOG.md", ".ci/run"}
    others |= {"docs/index.md", "benchmarks/fuzz.py", "scripts/update_readme.py", "examples/digits.py"}
    wanted = sources | python | tests | others | {"lora_kernels/py.typed", "pyproject.toml", "setup.py"}
    if (ROOT / ".git").exists():  # its own tests read the rest too, so everything in the repository is shipped
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        wanted |= {name for name in tracked.split("\0") if name and (ROOT / name).exists()}
    assert wanted <= shipped, f"not shipped: {sorted(wanted - shipped)}"
    built = {name for name in shipped if name.endswith((".so", ".o", ".pyc", "_built.json"))}
    assert not built, f"shipped, though built: {sorted(built)}"


@pytest.mark.parametrize("name", ["_C", "_cuda"])
def test_the_stub_has_the_names_of_the_module(name: str) -> None:
    module = pytest.importorskip(f"lora_kernels.{name}")
    tree = ast.parse((ROOT / "lora_kernels" / f"{name}.pyi").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    constants = {
        node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert functions | constants == {n for n in vars(module) if not n.startswith("__")}


def test_the_cuda_module_imports_without_a_driver() -> None:
    _cuda = pytest.importorskip("lora_kernels._cuda", reason="built without nvcc")
    info = _cuda.build_info()
    major = int(info["nvcc"].split(".")[0])
    assert info["arch"] == "sm_90a" and info["driver"] == {12: "525", 13: "580"}[major]
    try:
        devices = _cuda.devices()
    except RuntimeError as error:
        assert "cudaError" in str(error)
    else:
        assert all({"name", "capability", "sms", "shared_memory_optin"} <= device.keys() for device in devices)
