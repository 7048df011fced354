"""What ``tune`` measures: the operands of a pass, the plans to try for it, and how a back-end runs each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lora_kernels.core.dropout import dropout
from lora_kernels.core.operands import Adapter, Base
from lora_kernels.plans import quant_tiles
from lora_kernels.plans.sm90 import Sm90Plan
from lora_kernels.plans.tiles import Case, Plan
from lora_kernels.quant.weight import QuantizedWeight, quantize_weight
from lora_kernels.testing import judge


class Size(NamedTuple):
    """The size of one layer: x [M, K], w [N, K], a [R, K], b [N, R]."""

    M: int
    K: int
    N: int
    R: int

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N}:{self.R}"


class Setting(NamedTuple):
    """What all calls that one command measures have in common."""

    dtype: torch.dtype
    """The dtype of x and w."""
    adapter_dtype: torch.dtype
    p: float
    quant: str | None = None
    """The format of w. None: dense."""
    double_quant: bool = False

    @property
    def w_format(self) -> str:
        """The format of w, as `plans.tiles.Case` names it."""
        return quant_tiles.w_format(self.quant, self.double_quant) if self.quant else ""

    def case(self, size: Size) -> Case:
        """Return what the choice of a plan depends on at this size. Operands are aligned."""
        M, K, N, R = size
        return Case((self.dtype, self.adapter_dtype), M, N, K, R, self.p > 0, True, self.w_format)


class Device(NamedTuple):
    """The GPU that is measured."""

    device: torch.device
    name: str
    """The name that the driver gives the device. Plans are kept under it."""


class Operands:
    """One set of operands of a pass, and room for its results."""

    def __init__(self, setting: Setting, size: Size, device: torch.device, seed: int) -> None:
        M, K, N, R = size
        q = judge.problem(
            M, N, K, R, dtype=setting.dtype, adapter_dtype=setting.adapter_dtype, p=setting.p, bias=False, seed=seed,
            device=device,
        )  # fmt: skip
        self.q = q
        self.w: Tensor | QuantizedWeight = q.w
        """The weight that a pass gets."""
        if setting.quant:
            self.w = quantize_weight(q.w, setting.quant, double_quant=setting.double_quant)
        # A backward gets h as a forward saves it.
        x = q.x.float() if q.seed is None else dropout(q.x.float(), q.p, q.seed)
        self.h = (x @ q.a.float().t()).to(q.x.dtype)
        self.results = self.room()

    @property
    def base(self) -> Base:
        """The frozen half of the layer, with the weight that a pass gets."""
        return Base(self.w, self.q.bias)

    @property
    def adapter(self) -> Adapter:
        """The trained half of the layer."""
        return Adapter(self.q.a, self.q.b, self.q.scale, self.q.p, self.q.seed)

    @property
    def nbytes(self) -> int:
        """The bytes that a pass reads and writes."""
        return self.w.nbytes + self.q.x.nbytes + 2 * self.q.dy.nbytes

    def room(self) -> dict[str, Tensor]:
        """Return fresh tensors for the results of either pass.

        They hold NaN, so that the results of an earlier plan, left in the same memory, cannot pass for a result.
        """
        q = self.q
        like = {"y": q.dy, "h": self.h, "dx": q.x, "da": q.a, "db": q.b, "g": self.h}
        return {name: torch.full_like(t, torch.nan) for name, t in like.items()}


class Trial(NamedTuple):
    """One plan to try."""

    plan: Plan | Sm90Plan
    run: Callable[[Operands, dict[str, Tensor]], None]
    """Runs a pass by the plan. It reads the operands and writes into tensors from `Operands.room`: y and h in a
    forward; dx, da, db and g in a backward."""


@dataclass(frozen=True)
class Job:
    """One pass of one size, with the plans to try for it."""

    size: Size
    op: str
    """"forward" or "backward"."""
    key: str
    """The key under which the fastest plan is kept."""
    trials: dict[str, Trial]
    """The plans by description. The first is the one that runs where nothing is kept."""


class Subject(Protocol):
    """One back-end on one device, whose plans are measured."""

    setting: Setting
    on: Device

    def guard(self) -> AbstractContextManager[Any]:
        """Return a context in which the device is the current one."""

    def jobs(self, sizes: Sequence[Size]) -> list[Job]:
        """Return both passes of every size."""

    def left_behind(self) -> str | None:
        """Return, in words, what the last run left where the next one would find it, and remove it. None: nothing."""
