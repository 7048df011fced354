"""The choice between back-ends on a GPU, from evidence: which kernels are right on this device, and which are fastest.

* A back-end can be chosen where its class of kernels was right on this device. ``python -m lora_kernels verify`` finds
  that out for all of them. `composite` is checked at its first use as well (`first_use`). `eager` needs no proof.
* Where verify measured the bucket of the call, or one nearby, the fastest of those that beat `eager` is chosen. A
  back-end beats `eager` if the upper quartile of its times is below the median of `eager`'s.
* Elsewhere `composite` is chosen where it is right, else `eager`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

from lora_kernels.backends import first_use
from lora_kernels.core.operands import Call
from lora_kernels.evidence import file, find
from lora_kernels.evidence.file import RIGHT, Bucket, Timing

COMMAND = "python -m lora_kernels verify"


class Choice(NamedTuple):
    """The back-end for a call on a GPU, and what is known about every back-end that was considered."""

    name: str
    known: dict[str, str]
    """By back-end: a phrase that says whether it was right here, and how fast it was."""


def choose(call: Call, able: Sequence[str], load: Callable[[str], ModuleType]) -> Choice:
    """Return the choice among the back-ends `able` to serve a call; `eager` is one of them. Raises `first_use.NotNow`
    during a capture where the choice would depend on the check."""
    known = {name: _known(load(name), call) for name in able if name != "eager"}
    right = [name for name in able if name == "eager" or known[name].startswith(RIGHT)]
    measured = find.nearest(call)
    if measured is None:
        if not any(find.of(call.device).timings):
            _tell(call)
        name = "composite" if "composite" in right else "eager"
        return Choice(name, {each: f"{phrase}, not measured here" for each, phrase in known.items()})
    bucket, timing = measured
    known = {each: f"{phrase}, {_speed(each, bucket, timing)}" for each, phrase in known.items()}
    known["eager"] = _speed("eager", bucket, timing)
    return Choice(_fastest(right, timing), known)


def _fastest(right: Sequence[str], timing: Timing) -> str:
    """Return the fastest back-end that beats `eager`, or `eager`."""
    ratios = timing.ratios
    bar = ratios["eager"][1] if "eager" in ratios else float("inf")
    better = [name for name in right if name in ratios and name != "eager" and ratios[name][2] < bar]
    return min(better, key=lambda name: ratios[name][1], default="eager")


def _known(module: ModuleType, call: Call) -> str:
    """Return a phrase that says what is known about the results of a back-end's kernels on this device."""
    if module.name == "composite":
        verdict = first_use.verdict(module, call)
    else:
        key = file.class_key(module.name, module.kernel_class(call), call)
        found = find.of(call.device).verdicts.get(key)
        if found is None:
            return f"not yet run on this GPU ({COMMAND} runs it)"
        verdict = found
    return f"{verdict.result} here on {verdict.date}" + (f": {verdict.why}" if verdict.why else "")


def _speed(name: str, bucket: Bucket, timing: Timing) -> str:
    """Return a phrase such as "1.12 of the frozen layer (addmm_ 1.24, PEFT 1.43) in bucket M 8192 N 4096 ..."."""
    where = f"in bucket M {bucket.M} N {bucket.N} K {bucket.K} R {bucket.R}"
    if name not in timing.ratios:
        return f"not measured {where}"
    others = ", ".join(f"{each} {timing.ratios[each][1]:.2f}" for each in ("addmm_", "PEFT") if each in timing.ratios)
    return f"{timing.ratios[name][1]:.2f} of the frozen layer{f' ({others})' if others else ''} {where}"


_told = False


def _tell(call: Call) -> None:
    """Say once in a process that the kernels on this device can be measured. Only one of several ranks says it."""
    global _told
    if _told or find.off() or os.environ.get("RANK", "0") != "0":
        return
    _told = True
    warnings.warn(
        f"lora_kernels has not measured its kernels on {find.of(call.device).identity.device} yet. `{COMMAND}` takes "
        "a few minutes and finds the fastest that are right here. Until then `composite` serves the calls that its "
        f"check at first use finds right. {find.VARIABLE}=off silences this",
        stacklevel=2,
    )
