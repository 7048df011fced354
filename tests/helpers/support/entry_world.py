"""A folder for PYTHONPATH in which `lora_kernels_autoload` is installed beside stand-ins for torch, PEFT and this
package, so that a process of a test starts in a tenth of a second.

The stand-in for torch calls the entry points of its group as torch does. The one for PEFT has LoraModel in the module
where PEFT has it. The one for this package marks the layers that it would fuse.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

FILES = {
    "torch/__init__.py": """
from importlib.metadata import entry_points
for entry in entry_points(group="torch.backends"):
    entry.load()()
""",
    "peft/__init__.py": "import torch\nfrom peft.tuners.lora.model import LoraModel",
    "peft/tuners/__init__.py": "",
    "peft/tuners/lora/__init__.py": "",
    "peft/tuners/lora/model.py": """
import torch
class LoraModel:
    @staticmethod
    def _create_new_module(*args, **kwargs):
        return [*args]
""",
    "lora_kernels/__init__.py": "",
    "lora_kernels/peft/__init__.py": "",
    "lora_kernels/peft/enabling.py": "def made_by_environment(layer): return ['fused', *layer]",
    "lora_kernels/peft/tally.py": """
import json, os
def note(layer, folder):
    told = {"made": 1, "fused_calls": 5, "not_fused": {}, "passed_over": {}, "ended": True}
    with open(f"{folder}/{os.getpid()}.json", "w") as file: json.dump(told, file)
""",
}
"""The stand-ins: path → text."""

MAKE = "import peft; print(peft.LoraModel._create_new_module(1))"
"""A program that has PEFT make a layer, and prints it."""


def metadata() -> str:
    """Return the entry points that pyproject.toml declares for torch."""
    table = re.search(r'entry-points."torch.backends"\].*\n((?:.+\n)+)', (ROOT / "pyproject.toml").read_text())
    assert table
    return f"[torch.backends]\n{table[1]}".replace('"', "")


def install_metadata(folder: Path) -> Path:
    """Put this package's metadata and nothing else into `folder`, which then goes on PYTHONPATH."""
    info = folder / "lora_kernels-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lora_kernels\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(metadata())
    return folder


def make(folder: Path, **changed: str) -> Path:
    """Make the folder. `changed` replaces the texts of files, whose names have _ for / and no ending."""
    install_metadata(folder)
    shutil.copy(ROOT / "lora_kernels_autoload.py", folder)
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(changed.get(name.removesuffix(".py").replace("/", "_"), text))
    return folder


def environment(folder: Path, value: str | None, **more: str) -> dict[str, str]:
    """Return the environment of a process that finds `folder`, with LORA_KERNELS as `value`."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
    return kept | {"PYTHONPATH": str(folder)} | ({} if value is None else {"LORA_KERNELS": value}) | more


def run(folder: Path, code: str, value: str | None, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process that finds `folder`."""
    command = [sys.executable, *options, "-c", code]
    where = environment(folder, value, **more)
    return subprocess.run(command, env=where, cwd=folder, capture_output=True, text=True)
