"""The classes of kernels that could run on a device, and the small problems that each is judged by.

A class is what `evidence.file.class_key` tells apart. Its key comes from the back-end itself, as it does where a call
chooses its back-end, so that what is judged here is what will run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Call
from lora_kernels.evidence import file
from lora_kernels.plans.sm90 import BY_RULE, CLUSTERS, WITHOUT_CLUSTERS, Sm90Plan
from lora_kernels.tools.verify import experts, many
from lora_kernels.tools.verify.subject import Setting, Size

PASSES = ("forward", "backward")

CASES: tuple[tuple[Size, float], ...] = (
    (Size(200, 136, 264, 16), 0.1),
    (Size(2048, 1024, 1024, 16), 0.1),
    (Size(1024, 2048, 1024, 64), 0.1),
    (Size(16, 512, 256, 16), 0.1),
    (Size(64, 1024, 1024, 64), 0.1),
    (Size(130, 264, 136, 40), 0.0),
    (Size(2048, 1024, 1024, 16), 0.0),
    (Size(1024, 1024, 1024, 256), 0.0),
    (Size(256, 384, 520, 16), 0.0),
    (Size(500, 1024, 1024, 8), 0.0),
    (Size(64, 1024, 1024, 64), 0.0),
    (Size(40, 512, 512, 16), 0.0),
    (Size(16, 512, 256, 16), 0.0),
    (Size(1, 4096, 4096, 16), 0.0),
)
"""Sizes and dropout probabilities, for any dtypes and formats. Those that tell most come first."""
MOST = 3
"""The number of cases that one class is judged by."""


@dataclass(frozen=True)
class KernelClass:
    """A class of kernels, and what it is judged by."""

    key: str
    backend: str
    op: str
    setting: Setting
    """The types; its p is that of no case."""
    cases: tuple[tuple[Size, float], ...]
    """The sizes, each with its dropout probability."""
    plans: tuple[Sm90Plan, ...] = ()
    """Plans of the sm_90a kernels, each of which must be right. Empty: the back-end chooses its plan."""

    def to_json(self) -> dict[str, Any]:
        """Return the class as plain data."""
        return asdict(self) | {"setting": self.setting.to_json()}

    @staticmethod
    def from_json(kept: dict[str, Any]) -> KernelClass:
        """Return the class that `to_json` wrote."""
        cases = tuple((Size(*size), p) for size, p in kept["cases"])
        plans = tuple(Sm90Plan(*plan) for plan in kept["plans"])
        setting = Setting.from_json(kept["setting"])
        return KernelClass(kept["key"], kept["backend"], kept["op"], setting, cases, plans)


def kernel_classes(
    device: torch.device, settings: Sequence[Setting], layers: Iterable[tuple[Size, float]], most: int = MOST
) -> list[KernelClass]:
    """Return every class that the table of cases reaches on a device with the types of `settings`, the first of these
    first, and every further class that `layers`, sizes with their dropout probabilities, would run. The classes of many
    adapters and of experts have cases of their own."""
    named = list(dict.fromkeys((*CASES, *layers)))
    return [
        each
        for setting in settings
        for name in back_ends(device)
        for op in (*PASSES, *many.PASSES, *experts.PASSES)
        for each in _classes(name, op, device, setting, named if op in PASSES else many.CASES, most)
    ]


def back_ends(device: torch.device) -> list[str]:
    """Return the names of the back-ends with kernels that a device may have, those that need least first."""
    return [name for name in reversed(dispatch.AUTOMATIC.get(device.type, ())) if name != "eager"]


def key_of(name: str, call: Call) -> str | None:
    """Return the key of the class that a call runs in a back-end, or None where that cannot serve the call."""
    if dispatch.refusals(name, call):
        return None
    return file.class_key(name, dispatch.load(name).kernel_class(call), call)


def _classes(
    name: str, op: str, device: torch.device, setting: Setting, named: Sequence[tuple[Size, float]], most: int
) -> Iterator[KernelClass]:
    found: dict[str, list[tuple[Size, float]]] = {}
    for size, p in named:
        key = key_of(name, setting._replace(p=p).call(op, device, size))
        # A layer that is no case is a large problem, for classes that no case reaches.
        if key is not None and (key not in found or (size, p) in (*CASES, *many.CASES)):
            found.setdefault(key, []).append((size, p))
    for key, cases in found.items():
        yield from _split(KernelClass(key, name, op, setting, tuple(cases[:most])), device)


def _split(each: KernelClass, device: torch.device) -> Iterator[KernelClass]:
    """Yield a class; for the sm_90a kernels with tickets, also the class of the clusters, which the same calls may
    run."""
    size, p = each.cases[0]
    call = each.setting._replace(p=p).call(each.op, device, size)
    if each.backend != "cuda" or each.key != file.class_key("cuda", "tickets", call):
        yield each
        return
    yield KernelClass(*_fields(each), plans=(BY_RULE, Sm90Plan(128, 1), WITHOUT_CLUSTERS))
    yield KernelClass(file.class_key("cuda", CLUSTERS, call), *_fields(each)[1:], plans=(Sm90Plan(256, 2),))


def _fields(each: KernelClass) -> tuple[str, str, str, Setting, tuple[tuple[Size, float], ...]]:
    return each.key, each.backend, each.op, each.setting, each.cases
