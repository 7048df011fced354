"""The versions of this package, of Python and of the packages around it, and which of them were tested together."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from typing import Any

from lora_kernels.core.version import __version__

TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.6", "2.14"),
    "triton": ("3.6", "3.8"),
    "peft": ("0.19", "0.21"),
    "transformers": ("5.4", "5.24"),
    "bitsandbytes": ("0.50", "0.50"),
    "accelerate": ("1.15", "1.15"),
    "trl": ("1.14", "1.16"),
    "torchao": ("0.18", "0.18"),
    "diffusers": ("0.42", "0.42"),
}
"""The oldest and the newest release of each package with which the test suite, or its part about that package, has run.
Other releases may work: this package reads the interfaces that it uses, and leaves to PEFT what it does not know."""

NONE, BROKEN, INSIDE, OLDER, NEWER = "not installed", "broken", "tested", "older than tested", "newer than tested"


def versions() -> dict[str, str | None]:
    """Return the versions of Python, of this package and of those around it; None for one that is not installed."""
    return {"python": platform.python_version(), "lora_kernels": __version__} | {
        entry["name"]: entry["version"] for entry in packages()
    }


def packages() -> list[dict[str, Any]]:
    """Return for each package: `name`, `version`, `tested` and `state`. None of them is imported."""
    return [_package(name, *bounds) for name, bounds in TESTED.items()]


def _package(name: str, oldest: str, newest: str) -> dict[str, Any]:
    tested = oldest if oldest == newest else f"{oldest} to {newest}"
    entry = {"name": name, "version": None, "tested": tested}
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return entry | {"state": f"{BROKEN}: it has no metadata" if is_there(name) else NONE}
    except Exception as error:  # metadata that cannot be read
        return entry | {"state": f"{BROKEN}: its metadata cannot be read ({type(error).__name__})"}
    if not isinstance(version, str) or (own := _release(version)) is None:
        return entry | {"state": f"{BROKEN}: its metadata gives the version {version!r}"}
    state = OLDER if own < _bound(oldest) else NEWER if own > _bound(newest) else INSIDE
    return entry | {"version": version, "state": state}


def is_there(name: str) -> bool:
    """Return whether a package can be found, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _release(version: str) -> tuple[int, int] | None:
    """Return (major, minor) of a version; None for a text that is none."""
    found = re.match(r"v?(?:\d+!)?(\d+)(?:\.(\d+))?", version)
    return None if found is None else (int(found[1]), int(found[2] or 0))


def _bound(text: str) -> tuple[int, int]:
    found = _release(text)
    assert found is not None
    return found


def without_paths(text: str) -> str:
    """Return `text` with every absolute path cut to its last part."""
    return re.sub(r"(?<![\w/:.])/(?:[^\s/:'\"]+/)+([^\s/:'\"]+)", r"\1", text)
