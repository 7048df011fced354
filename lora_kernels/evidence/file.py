"""The file of evidence about one device: what it holds, and how it is read and written.

The file is JSON with a checksum. It is replaced as a whole or not at all, under a lock, so that several processes may
add to it.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels.core import atomic, locks
from lora_kernels.core.operands import Call, power_of_two
from lora_kernels.evidence.identity import Identity

SCHEMA = 1

RIGHT, WRONG, STUCK, BROKEN = "right", "wrong", "stuck", "broken"
"""The results of a class of kernels. wrong: its numbers, or its bits from run to run. stuck: it did not end in time.
broken: it raised an error or lost the device."""


class Verdict(NamedTuple):
    """What a class of kernels did when it was run."""

    result: str
    """`RIGHT`, `WRONG`, `STUCK` or `BROKEN`."""
    why: str
    """A phrase that says what went wrong; empty where the class is right."""
    date: str
    """The day, as 2026-11-28."""


class Bucket(NamedTuple):
    """Calls that share their measured times: one pass, the same types, and sizes that are nearly the same."""

    op: str
    """"forward" or "backward"."""
    dtype: str
    adapter_dtype: str
    M: int
    """A power of two: the largest number of rows in the bucket."""
    N: int
    K: int
    R: int
    """A power of two, at least 16: the largest rank in the bucket."""
    dropout: bool
    w_format: str


class Timing(NamedTuple):
    """The times of one bucket, all from the same run."""

    frozen_seconds: float
    """The median time of the frozen layer: F.linear in a forward, dy W in a backward."""
    ratios: Mapping[str, tuple[float, float, float]]
    """Lower quartile, median and upper quartile of time / time of the frozen layer, by name: back-ends, and "addmm_"
    and "PEFT" to compare with."""
    date: str


@dataclass(frozen=True)
class Evidence:
    """Everything that is known about the GPU kernels on one device."""

    identity: Identity
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """By class of kernels, named by `class_key`."""
    timings: Mapping[Bucket, Timing] = field(default_factory=dict)
    plans: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The fastest plans, by the key and in the form of `plans.store`."""

    def joined(self, other: Evidence) -> Evidence:
        """Return this evidence with that of `other` added; where both know something, `other` counts."""
        return replace(
            self,
            verdicts={**self.verdicts, **other.verdicts},
            timings={**self.timings, **other.timings},
            plans={**self.plans, **other.plans},
        )


class Unreadable(ValueError):
    """A file is damaged, was edited, or has another schema."""


def class_key(backend: str, kernels: str, call: Call) -> str:
    """Return the name of the class of kernels that a call runs, such as "triton forward tickets bfloat16+float32
    dropout nf4". `kernels` is what the back-end's ``kernel_class`` returns."""
    types = f"{name(call.dtype)}+{name(call.adapter_dtype)}"
    words = [backend, call.op, kernels, types, *["dropout"] * call.dropout]
    return " ".join([*words, *[call.w_format] * (call.w_format != "dense")])


def bucket_of(call: Call) -> Bucket:
    """Return the bucket of a call."""
    rank = max(16, power_of_two(call.R))
    types = name(call.dtype), name(call.adapter_dtype)
    return Bucket(call.op, *types, power_of_two(call.M), call.N, call.K, rank, call.dropout, call.w_format)


def name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a file: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def today() -> str:
    """Return the date, as 2026-11-28."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def read(path: Path) -> Evidence:
    """Return the evidence in a file. Raises OSError, or `Unreadable` with a sentence."""
    try:
        document = json.loads(atomic.contents(path))
        content = document["content"]
        if document["sha256"] != _checksum(content):
            raise Unreadable("its checksum does not match: it was edited or cut short")
        if content["schema"] != SCHEMA:
            raise Unreadable(f"its schema is {content['schema']}, and this version reads {SCHEMA}")
        return Evidence(
            _identity(content["identity"]),
            {key: _verdict(key, kept) for key, kept in content["verdicts"].items()},
            {_bucket(kept["bucket"]): _timing(kept) for kept in content["timings"]},
            {key: _checked(f"plan {key!r}", plan, isinstance(plan, dict)) for key, plan in content["plans"].items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def add(path: Path, new: Evidence) -> Evidence:
    """Add `new` to a file and return what the file then holds. What the file held before is dropped where it cannot be
    read or has another identity. Raises OSError where the file cannot be written; it is then left as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locks.locked(path.with_name(f".{path.name}.lock")):  # what two processes add is not lost
        whole = new
        with contextlib.suppress(OSError, Unreadable):
            before = read(path)
            whole = before.joined(new) if before.identity == new.identity else new
        _write(path, whole)
    return whole


def _write(path: Path, evidence: Evidence) -> None:
    content = {
        "schema": SCHEMA,
        "identity": evidence.identity._asdict(),
        "verdicts": {key: verdict._asdict() for key, verdict in sorted(evidence.verdicts.items())},
        "timings": [
            {"bucket": bucket._asdict(), **timing._asdict()} for bucket, timing in sorted(evidence.timings.items())
        ],
        "plans": {key: dict(plan) for key, plan in sorted(evidence.plans.items())},
    }
    # In ASCII, because the message of an error may hold a path that is no UTF-8.
    text = json.dumps({"sha256": _checksum(content), "content": content}, indent=1)
    atomic.replace({path: f"{text}\n".encode()})


def _checked(what: str, value: Any, fits: bool) -> Any:
    """Return a value that `fits`, and raise `Unreadable` for any other. The text shows the beginning of a long one."""
    if not fits:
        raise Unreadable(f"its {what} is {reprlib.repr(value)}")
    return value


def _identity(kept: dict[str, Any]) -> Identity:
    found = Identity(**kept)
    for name, value in found._asdict().items():
        kind = int if name == "multiprocessors" else str
        may_miss = name in ("triton", "ptxas", "extension")
        _checked(name, value, type(value) is kind or (may_miss and value is None))
    return found


def _verdict(key: str, kept: dict[str, Any]) -> Verdict:
    found = Verdict(**kept)
    _checked(f"result of {key!r}", found.result, found.result in (RIGHT, WRONG, STUCK, BROKEN))
    _checked(f"reason of {key!r}", found.why, isinstance(found.why, str))
    _date(found.date)
    return found


def _bucket(kept: dict[str, Any]) -> Bucket:
    bucket = Bucket(**kept)
    _checked("bucket's op", bucket.op, bucket.op in ("forward", "backward"))
    for name in ("dtype", "adapter_dtype", "w_format"):
        _checked(f"bucket's {name}", value := getattr(bucket, name), isinstance(value, str))
    for name in ("M", "N", "K", "R"):
        _checked(f"bucket's {name}", value := getattr(bucket, name), type(value) is int and 0 <= value < 1 << 63)
    _checked("bucket's dropout", bucket.dropout, isinstance(bucket.dropout, bool))
    return bucket


def _timing(kept: dict[str, Any]) -> Timing:
    seconds = kept["frozen_seconds"]
    _checked("frozen_seconds", seconds, _is_time(seconds))
    ratios = {}
    for variant, found in kept["ratios"].items():
        fits = isinstance(found, list) and len(found) == 3 and all(map(_is_time, found)) and found == sorted(found)
        low, middle, high = map(float, _checked(f"ratio of {variant!r}", found, fits))
        ratios[variant] = low, middle, high
    return Timing(float(seconds), ratios, _date(kept["date"]))


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= float(value) < float("inf")


def _date(value: Any) -> str:
    """Return a date in the form of `today`. Raises `Unreadable` for anything else."""
    fits = isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII) is not None
    return str(_checked("date", value, fits))


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
