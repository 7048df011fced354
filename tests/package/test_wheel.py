"""What is in a wheel, with and without a compiler, and what a source tree without its extension says."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT
from support.stand_in_compiler import stand_in

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not in a source tree")
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


def conftest():
    spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(folder: Path, built: bool) -> Path:
    """Write a package of the name, and return the folder to import it from."""
    (folder / "lora_kernels").mkdir(parents=True)
    (folder / "lora_kernels" / "__init__.py").touch()
    if built:
        (folder / "lora_kernels" / f"_C{SUFFIX}").touch()
    return folder


def test_a_source_tree_without_its_extension_says_what_to_do(tmp_path: Path) -> None:
    tree = package(tmp_path / "tree", built=False)
    said = conftest().advice(tree, [str(tree)])
    assert "no native extension" in said and f"pip install --no-deps -e {tree}" in said and "make test" in said
    assert "apt install g++" in said
    elsewhere = package(tmp_path / "site", built=True)
    said = conftest().advice(tree, [str(tree), str(elsewhere)])
    assert f"the one installed in {elsewhere / 'lora_kernels'}, which this folder hides" in said


def test_nothing_is_said_where_the_extension_is_there_or_another_package_is_tested(tmp_path: Path) -> None:
    tree, elsewhere = package(tmp_path / "tree", built=True), package(tmp_path / "site", built=True)
    assert conftest().advice(tree, [str(tree)]) == ""
    bare = package(tmp_path / "bare", built=False)
    assert conftest().advice(bare, [str(elsewhere), str(bare)]) == ""
    assert conftest().advice(bare, [str(tmp_path)]) == ""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, since a wheel that is built from a source tree leaves files there."""
    pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("sdist")
    command = [
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(folder),
        "sdist",
        "-k",
        "--formats=tar",
        "-d",
        str(folder),
    ]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (archive,) = folder.glob("*.tar")
    subprocess.run(["tar", "xf", archive, "-C", folder], check=True)
    return next(folder.glob("lora_kernels-*/setup.py")).parent


def wheel(sources: Path, folder: Path, cxx: str) -> tuple[str, dict[str, bytes]]:
    """Return the name of the wheel that pip builds with a compiler, and its files."""
    pytest.importorskip("wheel")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LORA_KERNELS")} | {"CXX": cxx}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder)]
    done = subprocess.run(
        [*command, str(sources)], env=environment, capture_output=True, text=True, timeout=280, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return path.name, {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_a_wheel_without_a_compiler_is_pure_and_keeps_the_reason(sources: Path, tmp_path: Path) -> None:
    name, files = wheel(sources, tmp_path, "/no/such/compiler")
    assert name.endswith("-py3-none-any.whl")
    assert "/no/such/compiler" in json.loads(files["lora_kernels/_built.json"])["modules"]["_C"]
    assert not [each for each in files if each.endswith((".so", ".pyd", ".dylib"))]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is a shell script")
def test_a_wheel_holds_the_package_with_its_extension_and_nothing_else(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    name, files = wheel(sources, tmp_path / "out", stand_in(tmp_path))
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}" in name and "none-any" not in name
    assert f"lora_kernels/_C{SUFFIX}" in files and "lora_kernels/py.typed" in files
    assert json.loads(files["lora_kernels/_built.json"])["modules"]["_C"] == ""
    top = {each.split("/")[0] for each in files}
    # The module beside the package is what torch loads where LORA_KERNELS=1.
    assert {each for each in top if not each.endswith(".dist-info")} == {"lora_kernels", "lora_kernels_autoload.py"}
    python_files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lora_kernels").rglob("*.py")}
    assert python_files <= set(files)
