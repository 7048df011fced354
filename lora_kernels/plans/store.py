"""Plans that ``python -m lora_kernels tune`` measured on this machine: the file they are kept in, and the look-up.

One JSON file per device under the user's cache directory. Read when a plan is first asked for, never at import. A file
of other versions of torch, Triton or this package is passed over; one that is damaged or was edited, which its checksum
shows, is passed over with a warning.
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
from lora_kernels.plans import quant_tiles, tiles, tilings
from lora_kernels.plans.tiles import Plan, Tile
from lora_kernels.plans.tilings import Tiling

SCHEMA = 2
P = TypeVar("P", Plan, Tiling)


def path(device: str) -> Path:
    """Where the plans of a device, named as its driver names it, are kept: under XDG_CACHE_HOME, or ~/.cache."""
    # The directories' standard has a relative path count as none.
    home = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache"))
    return root / "lora_kernels" / f"tuned-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def key(
    op: str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    R: int,
    dropout: bool,
    w_format: str = "",
) -> str:
    """What a plan is kept under: N and K as they are, M rounded up to a power of two, R to the tile that holds it (a
    power of two, at least 16), and how w is quantised, if it is (as in `tiles.Case`)."""
    rows, rank = _power_of_two(M), max(16, _power_of_two(R))
    types = "+".join(str(each).removeprefix("torch.") for each in (dtype, adapter_dtype))
    words = [op, types, f"M{rows} N{N} K{K} R{rank}", *["dropout"] * dropout, *[w_format] * bool(w_format)]
    return " ".join(words)


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def find(device: str, entry: str, kind: type[P]) -> P | None:
    """The plan of a kind kept for `device` under `entry`, a `key`; None where there is none."""
    found = load(device).get(entry)
    return found if isinstance(found, kind) else None


@functools.lru_cache(maxsize=16)
def load(device: str) -> Mapping[str, Plan | Tiling]:
    """Every plan kept for `device` by these versions; none where the file cannot serve, and a RuntimeWarning that names
    it where it should have."""
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


def _plan(kept: dict[str, Any]) -> Plan | Tiling:
    if "tile" in kept:
        return Plan(**kept | {"tile": Tile(**kept["tile"])})
    return Tiling(**kept)


def _written(plan: Plan | Tiling) -> dict[str, Any]:
    return plan._asdict() | ({"tile": asdict(plan.tile)} if isinstance(plan, Plan) else {})


def store(device: str, plans: Mapping[str, Plan | Tiling]) -> Path:
    """Keep `plans`, and no others, for `device`: whole or not at all. The file's path; raises OSError where it cannot
    be written."""
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
    cache_clear()
    return place


def forget(device: str) -> bool:
    """Delete what is kept for `device`, of any versions; whether there was anything."""
    place = path(device)
    existed = place.exists()
    place.unlink(missing_ok=True)
    cache_clear()
    return existed


def cache_clear() -> None:
    """Have the next call of every kind read the file and choose its plan again."""
    for cached in (load, tiles.plan, quant_tiles.plan, tilings.find):
        cached.cache_clear()


def versions() -> dict[str, str | None]:
    """What a measured plan holds for, and nothing else."""
    return {"torch": torch.__version__, "triton": _triton(), "lora_kernels": __version__}


def _triton() -> str | None:
    """Triton's version, without importing it; builds of torch bring it under other names."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
