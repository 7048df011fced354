"""Stop a run of the tests that would test a source tree without its native extension, and say what to do."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent


def advice(root: Path, path: list[str]) -> str:
    """Return what to do before the tests can run, or "" if they can.

    `lora_kernels` is imported from the first folder of `path` that has it. In a source tree it needs the extension of
    this Python, which `pip install lora_kernels` puts into another folder.
    """
    folders = [Path(entry or ".", "lora_kernels") for entry in path]
    found = [folder for folder in folders if (folder / "__init__.py").exists()]
    if not found or found[0].resolve() != (root / "lora_kernels").resolve() or _built(found[0]):
        return ""
    python = "{}.{}".format(*sys.version_info)
    text = f"{found[0].resolve()} has no native extension for Python {python}, and these tests need it.\n"
    text += f"  Build it here:    pip install --no-deps -e {root}   (or: make test, which also sets up .venv)\n"
    installed = next((folder for folder in found[1:] if _built(folder)), None)
    if installed:
        text += (
            f"  Or test the one installed in {installed.resolve()}, which this folder hides: copy tests/ and "
            "pyproject.toml to an empty folder, and run pytest there."
        )
    else:
        text += "  Without a compiler: apt install g++ python3-dev"
    return text


def _built(package: Path) -> bool:
    return any((package / f"_C{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES)


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run where `advice` has something to say."""
    if text := advice(ROOT, sys.path):
        raise pytest.UsageError(text)
