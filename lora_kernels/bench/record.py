"""The document of a run: its measurements, its failures, and what another process needs to resume it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels.bench.shapes import Cell, Shape
from lora_kernels.bench.variants import FLOOR, Variant
from lora_kernels.evidence import identity
from lora_kernels.testing import documents

METHOD = (
    "Every number stands behind a check of values and gradients against fp64 in the same run. Variants are "
    "interleaved in rounds, in turning order; × is the median over rounds of time / time of the frozen layer "
    "(F.linear, backward to x only) in the same round, ± half its interquartile range; times are medians."
)
STRIKES = 2
"""After this many failures a variant is measured on no further shape."""


@dataclass(frozen=True)
class Setting:
    """The choices that hold for a whole run."""

    device: torch.device
    rounds: int
    command: str
    """The command that repeats the run."""
    baselines: list[Variant]
    """The variants to compare with."""
    backend: str | None = None
    """The one back-end of ours to measure; None for all."""
    without: Sequence[str] = ()
    """The back-ends of ours to leave out."""
    suite: str | None = None
    """The named set of shapes, if one was asked for."""


class Record:
    """The document that is written as JSON, and the step that runs now."""

    def __init__(self, setting: Setting, notes: Sequence[str]) -> None:
        self.doing: Callable[[str], None] = lambda what: None
        """The function that is called with the name of each step before it runs."""
        self.now: dict[str, Any] = {}
        """The step that runs now, as it enters the document if it fails: shape, p, pass, variant."""
        packages = ("torch", "triton", "peft")
        self.document: dict[str, Any] = documents.begin(setting.device, packages, setting.command) | {
            "method": METHOD,
            "rounds": setting.rounds,
            "suite": setting.suite,
            "identity": identity.identify(setting.device)._asdict() if setting.device.type == "cuda" else None,
            "roofline": None,
            "notes": list(notes),
            "failed": [],
            "shapes": {},
            "gate": [],
            "timings": [],
            "noise": [],
            "memory": [],
            "overhead": [],
            "layer_calls": [],
            "import": None,
        }

    def resume(self, document: dict[str, Any]) -> None:
        """Go on with the document of another process.

        The shape that it was measuring when it ended is measured anew, without the variant that ended it. If that
        variant is not known, the shape is left out.
        """
        self.document = document
        name = document.pop("measuring", None)
        if name is not None and not any(failure["shape"] == name for failure in document["failed"]):
            self.now = {"shape": name, "p": None, "pass": None, "variant": None}
            self.failed("the process ended while it was measured")
        elif name is not None:
            self._forget(name)

    def tell(self, cell: Cell, variant: str) -> None:
        """Name the step that runs next: a variant in a cell, whose pass may also be a step before or after timing."""
        self.now = cell.entry() | {"variant": variant}
        self.doing(f"{cell.shape.name} p={cell.p:g}: {variant}, {cell.which}")

    def failed(self, why: str) -> None:
        """Put on record that the step that runs now failed. Its shape loses the numbers that it has."""
        self.document["failed"].append(self.now | {"why": why})
        where = " ".join(str(self.now[key]) for key in ("variant", "pass") if self.now[key])
        p = "" if self.now["p"] is None else f" p={self.now['p']:g}"
        self.document["notes"].append(f"{self.now['shape']}{p}: {where + ': ' if where else ''}{why}")
        self._forget(self.now["shape"])

    def left_out(self, shape: Shape) -> bool:
        """Return whether a shape is measured already, or cannot be because the frozen layer or an unknown variant
        failed."""
        failures = [failure["variant"] for failure in self.document["failed"] if failure["shape"] == shape.name]
        return shape.name in self.document["shapes"] or None in failures or FLOOR.name in failures

    def struck(self, shape: Shape, variant: Variant) -> bool:
        """Return whether a variant failed on this shape, or on `STRIKES` shapes."""
        failures = [each["shape"] for each in self.document["failed"] if each["variant"] == variant.name]
        return shape.name in failures or len(failures) >= STRIKES

    def _forget(self, name: str) -> None:
        self.document["shapes"].pop(name, None)
        for kind in ("gate", "timings", "noise", "memory"):
            self.document[kind] = [entry for entry in self.document[kind] if entry["shape"] != name]
