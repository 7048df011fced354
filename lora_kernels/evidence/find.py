"""The evidence that holds on a device of this machine, from every place where files are looked for.

1. ``LORA_KERNELS_EVIDENCE``: paths of files, separated by colons. They may be read-only. ``off`` means that no file is
   read or written, and that nothing is warned about.
2. The user's cache: ``$XDG_CACHE_HOME/lora_kernels`` or ``~/.cache/lora_kernels``.
3. The files that are shipped with the package.

Where several files know something, the first place counts. Files are read once in a process, when a GPU kernel is first
considered, and what this process adds itself is known to it at once.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels.core.operands import Call
from lora_kernels.evidence import file, identity
from lora_kernels.evidence.file import Bucket, Evidence, Timing, Unreadable, Verdict
from lora_kernels.evidence.identity import Identity

VARIABLE = "LORA_KERNELS_EVIDENCE"
SHIPPED = Path(__file__).resolve().parent / "shipped"
MOST_DISTANT = 2.0
"""The largest distance at which the times of one bucket speak for the calls of another."""
FEW = 64
"""Up to this many rows other kernels run, so that buckets on the two sides of it do not speak for each other."""


class Place(NamedTuple):
    """A file that is looked at."""

    path: Path
    shipped: bool


class Passed(NamedTuple):
    """A file that was found but does not hold here."""

    path: Path
    why: list[str]


class Found(NamedTuple):
    """What the files say about a device."""

    evidence: Evidence
    used: list[Path]
    passed: list[Passed]
    """The files that do not hold here. Files about other devices are not among them."""


_found: dict[torch.device, Found] = {}
"""What was found, by device. `forget` empties it."""


def of(device: torch.device) -> Evidence:
    """Return the evidence that holds on a GPU."""
    return found(device).evidence


def found(device: torch.device) -> Found:
    """Return the evidence that holds on a GPU, and the files that it comes from."""
    if device not in _found:
        _found[device] = _look(identity.identify(device))
    return _found[device]


def forget() -> None:
    """Make the next question read the files again."""
    _found.clear()


def off() -> bool:
    """Return whether ``LORA_KERNELS_EVIDENCE=off`` was given."""
    return os.environ.get(VARIABLE) == "off"


def cache_path(of: Identity) -> Path:
    """Return the file of a device in the user's cache."""
    # The XDG base directory specification has a relative path ignored.
    home = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache"))
    device = re.sub(r"[^a-z0-9]+", "-", f"{of.device} {of.multiprocessors}".lower()).strip("-")
    return root / "lora_kernels" / f"evidence-{device}.json"


def add(
    device: torch.device,
    verdicts: Mapping[str, Verdict] | None = None,
    timings: Mapping[Bucket, Timing] | None = None,
    plans: Mapping[str, Mapping[str, Any]] | None = None,
    path: Path | None = None,
) -> Path:
    """Add findings about a device to a file, that in the user's cache by default, and make them known to this process.
    Return the file's path. Raises OSError where it cannot be written; this process knows the findings all the same."""
    here = identity.identify(device)
    new = Evidence(here, verdicts or {}, timings or {}, plans or {})
    remember(device, new)
    place = cache_path(here) if path is None else path
    file.add(place, new)
    return place


def remember(device: torch.device, new: Evidence) -> None:
    """Make findings about a device known to this process alone."""
    known = found(device)
    _found[device] = known._replace(evidence=known.evidence.joined(new))


def nearest(call: Call) -> tuple[Bucket, Timing] | None:
    """Return the measured bucket that speaks for a call: its own, or else the nearest. The distance of two buckets is
    the sum of the distances of their sizes, in powers of two. None where all are further than `MOST_DISTANT`."""
    timings, wanted = of(call.device).timings, file.bucket_of(call)
    if wanted in timings:
        return wanted, timings[wanted]
    near = [(_distance(bucket, wanted), bucket) for bucket in timings]
    distance, bucket = min(near, default=(MOST_DISTANT + 1, wanted))
    return (bucket, timings[bucket]) if distance <= MOST_DISTANT else None


def _distance(bucket: Bucket, wanted: Bucket) -> float:
    import math

    sizes = ("M", "N", "K", "R")
    alike = bucket._replace(M=0, N=0, K=0, R=0) == wanted._replace(M=0, N=0, K=0, R=0)
    if not alike or (bucket.M <= FEW) != (wanted.M <= FEW):
        return math.inf
    pairs = ((getattr(bucket, size), getattr(wanted, size)) for size in sizes)
    return sum(abs(math.log2(max(a, 1)) - math.log2(max(b, 1))) for a, b in pairs)


def _places(here: Identity) -> Iterator[Place]:
    for name in filter(None, os.environ.get(VARIABLE, "").split(":")):
        yield Place(Path(name), False)
    yield Place(cache_path(here), False)
    for path in sorted(SHIPPED.glob("*.json")):
        yield Place(path, True)


def _look(here: Identity) -> Found:
    evidence, used, passed = Evidence(here), list[Path](), list[Passed]()
    if off():
        return Found(evidence, used, passed)
    for place in _places(here):
        try:
            kept = file.read(place.path)
        except FileNotFoundError:
            if place.path != cache_path(here):
                passed.append(Passed(place.path, ["there is no such file"]))
                _warn(
                    f"{VARIABLE} names {place.path}, and there is no such file: correct the variable, or write the "
                    f"file (python -m lora_kernels verify --out {place.path})"
                )
            continue
        except (OSError, Unreadable) as error:
            passed.append(Passed(place.path, [str(error)]))
            _warn(f"{place.path} is ignored: {error} (python -m lora_kernels verify writes it anew)")
            continue
        if (kept.identity.device, kept.identity.multiprocessors) != (here.device, here.multiprocessors):
            continue
        if stale := identity.differences(kept.identity, here, place.shipped):
            passed.append(Passed(place.path, stale))
            continue
        evidence = kept.joined(evidence)
        used.append(place.path)
    return Found(Evidence(here, evidence.verdicts, evidence.timings, evidence.plans), used, passed)


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)
