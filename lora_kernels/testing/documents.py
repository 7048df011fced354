"""Documents of measurements: what each of them begins with, and how it is written to a JSON file."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_kernels.core import atomic
from lora_kernels.testing import machine

SCHEMA = 1


def begin(device: torch.device, packages: Sequence[str], command: str | None = None) -> dict[str, Any]:
    """Return a document that holds the date, the commit, the versions of `packages` and the device, and `command` if
    given."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **({} if command is None else {"command": command}),
        "commit": machine.commit(),
        "versions": machine.versions(*packages),
        "device": machine.describe_device(device),
    }


def write(document: dict[str, Any], path: Path) -> None:
    """Write JSON to `path` as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace({path: f"{json.dumps(document, indent=1, ensure_ascii=False)}\n".encode()})
