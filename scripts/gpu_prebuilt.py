"""The folder that gpu_prepare.sh fills without a GPU, and that is then copied to a machine with one. It holds

manifest.json   what it was made from and for
native/         the native modules `_C` and `_cuda`
triton/         a cache of compiled Triton kernels
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gpu_triton_cache

ROOT = Path(__file__).resolve().parent.parent
MANIFEST, NATIVE, TRITON = "manifest.json", "native", "triton"
MOST_BYTES = 64 * 2**20
"""The most that the folder may hold."""


class Unusable(ValueError):
    """The folder cannot be used with this Python or this checkout."""


def suffix() -> str:
    """Return the end of the names of this Python's native modules."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def source_hash(root: Path = ROOT) -> str:
    """Return a hash of the sources of the native modules."""
    digest = hashlib.sha256()
    for path in sorted(
        path for path in (root / "csrc").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write_manifest(folder: Path, more: dict[str, Any], root: Path = ROOT) -> None:
    """Write the manifest: this Python, the native sources, and `more`. It is written last, so that a folder that was
    not finished cannot be used."""
    manifest = {"suffix": suffix(), "csrc": source_hash(root), **more}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def put_in_place(folder: Path, root: Path = ROOT) -> dict[str, str]:
    """Copy the native modules into the package, and return what processes need in their environment to use the cache.

    Raises Unusable, with a sentence, where the modules were built for another Python or from other sources. The cache
    needs no check: Triton itself compiles again what it does not find there. But it keeps absolute paths, which are
    those of the machine that filled it until they are written anew.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise Unusable(f"{error.strerror}: {MANIFEST}. scripts/gpu_prepare.sh writes it") from error
    if manifest["suffix"] != suffix():
        raise Unusable(
            f"its native modules end with {manifest['suffix']}, and this Python loads {suffix()}: run "
            "scripts/gpu_prepare.sh with --python of this version"
        )
    if manifest["csrc"] != source_hash(root):
        raise Unusable("csrc/ has changed since scripts/gpu_prepare.sh built its native modules: run it again")
    for module in sorted((folder / NATIVE).iterdir()):
        beside = root / "lora_kernels" / f".{module.name}"
        shutil.copy2(module, beside)
        beside.replace(root / "lora_kernels" / module.name)  # a process may have loaded the old one
    gpu_triton_cache.relocate(folder / TRITON)
    return {"TRITON_CACHE_DIR": str(folder / TRITON)}


def size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in files(folder))


def files(folder: Path) -> Iterable[Path]:
    """Return all files in a folder and the folders below it."""
    return (path for path in folder.rglob("*") if path.is_file())
