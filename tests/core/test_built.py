"""What the build of an installation left out is told with its reason, and with the command that brings it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_kernels.core import built


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installation whose build wrote no record."""
    folder = tmp_path / "lora_kernels"
    folder.mkdir()
    monkeypatch.setattr(built, "PACKAGE", folder)
    return folder


def write(package: Path, **record: object) -> None:
    (package / "_built.json").write_text(json.dumps(record))


def test_the_reason_of_the_build_is_told(package: Path) -> None:
    assert built.why_missing("_C") == "this installation was not built"
    write(package, platform="linux-x86_64", compiler="", modules={"_C": "c++: not found", "_cuda": ""}, left_out={})
    assert built.why_missing("_C") == "when this installation was built: c++: not found"
    assert "built for linux-x86_64" in built.why_missing("_cuda")


def test_the_reason_why_an_instruction_set_was_left_out_is_told(package: Path) -> None:
    assert built.left_out("avx2") == "the build does not say why"
    write(package, compiler="g++ 9.3", modules={"_C": ""}, left_out={"avx512_bf16": "unrecognized option"})
    assert built.left_out("avx512_bf16") == "g++ 9.3 could not compile them: unrecognized option"


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_record_that_cannot_be_read_is_none(text: str, package: Path) -> None:
    (package / "_built.json").write_text(text, encoding="latin-1")
    assert built.record() == {} and built.why_missing("_C")


def test_the_command_passes_by_the_wheel_that_pip_has_kept(package: Path) -> None:
    """pip keeps a wheel that it built without a compiler, and would install it again."""
    assert built.reinstall() == "pip install --no-cache-dir --force-reinstall --no-deps lora_kernels"
    assert built.reinstall(cuda=True).startswith("LORA_KERNELS_CUDA=1 pip install --no-cache-dir")
    assert "--no-binary lora_kernels lora_kernels" in built.reinstall(cuda=True)
    (package.parent / "csrc").mkdir()
    (package.parent / "csrc" / "native_build.py").touch()
    assert built.reinstall() == "pip install --no-deps -e ."
    assert built.reinstall(cuda=True) == "LORA_KERNELS_CUDA=1 pip install --no-deps -e ."
