"""The file of plans that ``python -m lora_kernels tune`` measured on this machine.

There is one JSON file per device, under the user's cache directory. It is read when a plan is first asked for, never at
import. A file written with other versions of torch, Triton or this package is ignored. A file that is damaged or was
edited, which its checksum shows, is ignored with a warning.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora_kernels.core.version import __version__
from lora_kernels.plans.sm90 import Sm90Plan
from lora_kernels.plans.tiles import Case, Plan, Tile

SCHEMA = 2
P = TypeVar("P", Plan, Sm90Plan)


def path(device: str) -> Path:
    """Return the file of a device, named as its driver names it: under XDG_CACHE_HOME, or ~/.cache."""
    # The XDG base directory specification has a relative path ignored.
    home = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache"))
    return root / "lora_kernels" / f"tuned-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def key(op: str, case: Case) -> str:
    """Return the key of a plan in the file.

    It names the dtypes of x and of the adapters, N and K as they are, M rounded up to a power of two, R rounded up to
    the tile that holds it (a power of two, at least 16), dropout, and the format of a quantised w.
    """
    rows, rank = _power_of_two(case.M), max(16, _power_of_two(case.R))
    types = "+".join(str(each).removeprefix("torch.") for each in case.dtypes)
    words = [op, types, f"M{rows} N{case.N} K{case.K} R{rank}"]
    return " ".join([*words, *["dropout"] * case.dropout, *[case.w_format] * bool(case.w_format)])


def sm90_key(op: str, case: Case) -> str:
    """Return the key of a plan of the sm_90a kernels, which share the file with the Triton kernels."""
    return f"cuda {key(op, case)}"


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def find(device: str, entry: str, kind: type[P]) -> P | None:
    """Return the plan of type `kind` that the file of `device` holds under the key `entry`, or None."""
    found = load(device).get(entry)
    return found if isinstance(found, kind) else None


@functools.lru_cache(maxsize=16)
def load(device: str) -> Mapping[str, Plan | Sm90Plan]:
    """Return every plan in the file of `device`, by key. Empty where there is no file, or one of other versions.

    A file that cannot be read gives an empty result and a RuntimeWarning that names it.
    """
    place = path(device)
    try:
        document = json.loads(place.read_text(encoding="utf-8"))
        content = document["content"]
        if document["sha256"] != _checksum(content):
            raise ValueError("its checksum does not match: it was edited or cut short")
        if content["schema"] != SCHEMA or content["device"] != device or content["versions"] != versions():
            return {}
        return {entry: _plan(kept) for entry, kept in content["plans"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{place}: measured plans are ignored, and the tables of lora_kernels used: "
            f"{type(error).__name__}: {error} (python -m lora_kernels tune --forget deletes the file)",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def _plan(kept: dict[str, Any]) -> Plan | Sm90Plan:
    if "tile" in kept:
        return Plan(**kept | {"tile": Tile(**kept["tile"])})
    return Sm90Plan(**kept)


def _written(plan: Plan | Sm90Plan) -> dict[str, Any]:
    return plan._asdict() | ({"tile": asdict(plan.tile)} if isinstance(plan, Plan) else {})


def write(device: str, plans: Mapping[str, Plan | Sm90Plan]) -> Path:
    """Replace the file of `device` by one that holds `plans`, whole or not at all. Return its path.

    Raises OSError where it cannot be written. The caller clears the caches: `choose.keep` does both.
    """
    content = {
        "schema": SCHEMA,
        "device": device,
        "versions": versions(),
        "plans": {entry: _written(plans[entry]) for entry in sorted(plans)},
    }
    place = path(device)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        text = json.dumps({"sha256": _checksum(content), "content": content}, indent=1, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)
    return place


def remove(device: str) -> bool:
    """Delete the file of `device`. Return whether there was one. `choose.forget` clears the caches as well."""
    place = path(device)
    existed = place.exists()
    place.unlink(missing_ok=True)
    return existed


def versions() -> dict[str, str | None]:
    """Return the versions that a measured plan is valid for."""
    return {"torch": torch.__version__, "triton": _triton(), "lora_kernels": __version__}


def _triton() -> str | None:
    """Return Triton's version without importing it. Some builds of torch bring it under another name."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
