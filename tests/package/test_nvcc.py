"""The build takes the nvcc that fits, refuses one that is too old, and hashes the sources that it compiles."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not in a source tree")


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Return the module, on a machine that has no nvcc yet."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORA_KERNELS_CUDA", "auto")
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.syspath_prepend(ROOT / "csrc")
    module = importlib.import_module("native_nvcc")
    monkeypatch.setattr(module, "LOCAL", tmp_path / "local")
    return module


def install(folder: Path, version: str) -> str:
    """Write a toolkit whose nvcc says this version, and return the path of its nvcc."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    path.chmod(0o755)
    return str(path)


def test_cuda_home_and_cuda_path_come_before_all_others(
    nvcc: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home, on_path = install(tmp_path / "home", "13.0"), install(tmp_path / "path", "12.4")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing here"))
    assert nvcc.find_nvccs() == [on_path]
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "home"))
    assert nvcc.find_nvccs() == [home]


def test_toolkits_are_found_on_path_first_and_then_the_newest_first(nvcc: ModuleType, tmp_path: Path) -> None:
    folders = [tmp_path / "path", *(tmp_path / "local" / name for name in ("cuda", "cuda-12.10", "cuda-12.9"))]
    assert nvcc.find_nvccs() == []
    paths = [install(folder, "12.9") for folder in folders]
    assert nvcc.find_nvccs() == paths


@pytest.mark.parametrize(("major", "chosen"), [(12, "12.8"), (13, "13.0"), (11, "13.0"), (None, "13.0")])
def test_the_first_that_fits_torch_is_taken_else_the_first(
    major: int | None, chosen: str, nvcc: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    versions = {"path": "11.8", "local/cuda": "13.0", "local/cuda-12.8": "12.8", "local/cuda-12.4": "12.4"}
    paths = {version: install(tmp_path / folder, version) for folder, version in versions.items()}
    monkeypatch.setattr(nvcc, "torch_cuda_major", lambda: major)
    assert nvcc.wanted_nvcc() == paths[chosen]
    monkeypatch.setenv("LORA_KERNELS_CUDA", "0")
    assert nvcc.wanted_nvcc() is None


def test_nobody_gets_minutes_of_compiling_unasked(
    nvcc: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(tmp_path / "path", "13.0")
    assert nvcc.wanted_nvcc() is not None
    for value in ("0", "", None):
        if value is None:
            monkeypatch.delenv("LORA_KERNELS_CUDA")
        else:
            monkeypatch.setenv("LORA_KERNELS_CUDA", value)
        assert nvcc.wanted_nvcc() is None


def test_an_nvcc_that_is_too_old_is_refused(
    nvcc: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = install(tmp_path / "path", "11.8")
    assert nvcc.wanted_nvcc() is None
    said = capsys.readouterr().err
    assert f"need nvcc 12.4 or later, which compiles for sm_90a, and {old} is nvcc 11.8" in said
    monkeypatch.setenv("LORA_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match=r"LORA_KERNELS_CUDA=1, but .* need nvcc 12\.4 or later"):
        nvcc.wanted_nvcc()


def test_requiring_cuda_without_nvcc_is_an_error(nvcc: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvcc.wanted_nvcc() is None
    monkeypatch.setenv("LORA_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match=r"LORA_KERNELS_CUDA=1, but there is no nvcc.*CUDA_HOME"):
        nvcc.wanted_nvcc()
    monkeypatch.setenv("LORA_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="'yes': expected 0 \\(the default\\), auto or 1"):
        nvcc.wanted_nvcc()


def test_a_file_that_says_no_version_is_too_old(nvcc: ModuleType, tmp_path: Path) -> None:
    assert nvcc.version_of(install(tmp_path, "12.9")) == (12, 9)
    assert nvcc.version_of(str(tmp_path / "missing")) == (0, 0)
    assert nvcc.version_of("/bin/true") == (0, 0)


@pytest.mark.parametrize(
    ("text", "major"),
    [
        ("cuda: Optional[str] = '12.8'", 12),
        ("__version__ = '2.11.0'\ncuda: _Optional[str] = '13.0'\nhip = None", 13),
        ("cuda: Optional[str] = None", None),
        ("debug = False", None),
    ],
)
def test_torchs_cuda_is_read_without_importing_it(
    text: str, major: int | None, nvcc: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torch" / "version.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert nvcc.torch_cuda_major() == major


def test_the_hash_changes_with_every_source_and_with_no_other_file(
    nvcc: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for elsewhere in (tmp_path / "one", tmp_path / "two"):
        shutil.copytree(ROOT / "csrc", elsewhere, ignore=shutil.ignore_patterns("__pycache__", "cpu"))
    here = nvcc.source_hash()
    monkeypatch.setattr(nvcc, "CSRC", tmp_path / "one")
    (tmp_path / "one" / "bindings.cpp").write_text("")
    assert nvcc.source_hash() == here
    seen = {here}
    for path in nvcc.cuda_sources():
        path.write_bytes(path.read_bytes() + b"\n")
        seen.add(nvcc.source_hash())
    assert len(seen) == 1 + len(nvcc.cuda_sources())
    assert (tmp_path / "one" / "philox.h") in nvcc.cuda_sources()


def test_the_built_module_tells_the_hash_of_these_sources(nvcc: ModuleType) -> None:
    """A module that was built from other sources is skipped: it would be built again."""
    _cuda = pytest.importorskip("lora_kernels._cuda", reason="built without nvcc")
    sources = _cuda.build_info()["sources"]
    if Path(_cuda.__file__).stat().st_mtime < max(path.stat().st_mtime for path in nvcc.cuda_sources()):
        pytest.skip("lora_kernels._cuda is older than its sources")
    assert sources == nvcc.source_hash()
