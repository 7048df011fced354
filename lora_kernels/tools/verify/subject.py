"""What `verify` runs: the operands of a pass, how a back-end runs it, and the plans to try for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lora_kernels.core.dropout import dropout
from lora_kernels.core.operands import Adapter, Base, Call, Needs, power_of_two
from lora_kernels.evidence import file
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
    """What calls of several sizes have in common."""

    dtype: torch.dtype
    """The dtype of x and w."""
    adapter_dtype: torch.dtype
    p: float
    quant: str | None = None
    """The format of w. None: dense."""
    double_quant: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the setting as plain data."""
        return self._asdict() | {"dtype": file.name(self.dtype), "adapter_dtype": file.name(self.adapter_dtype)}

    @staticmethod
    def from_json(kept: dict[str, Any]) -> Setting:
        """Return the setting that `to_json` wrote."""
        dtypes = {name: getattr(torch, kept[name]) for name in ("dtype", "adapter_dtype")}
        return Setting(**kept | dtypes)

    @property
    def w_format(self) -> str:
        """The format of w, as `plans.tiles.Case` names it."""
        return quant_tiles.w_format(self.quant, self.double_quant) if self.quant else ""

    def call(self, op: str, device: torch.device, size: Size) -> Call:
        """Return what the choice of a back-end depends on at this size."""
        M, K, N, R = size
        M, w_format = power_of_two(M), self.quant or "dense"
        return Call(op, device, self.dtype, self.adapter_dtype, M, N, K, R, self.p > 0, w_format)

    def case(self, size: Size) -> Case:
        """Return what the choice of a plan depends on at this size. Operands are aligned."""
        M, K, N, R = size
        return Case((self.dtype, self.adapter_dtype), M, N, K, R, self.p > 0, True, self.w_format)


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
        self.h = (x @ q.a.float().t()).to(q.a.dtype)
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


Run = Callable[[Operands, dict[str, Tensor]], None]
"""Runs a pass. It reads the operands and writes into tensors from `Operands.room`, or replaces them: y and h in a
forward; dx, da, db and g in a backward."""


def run_of(module: ModuleType | Any, op: str) -> Run:
    """Return how a back-end runs a pass."""

    def forward(operands: Operands, out: dict[str, Tensor]) -> None:
        (out["y"],), (out["h"],) = module.forward(operands.q.x, [operands.base], [operands.adapter], [True])

    def backward(operands: Operands, out: dict[str, Tensor]) -> None:
        base, everything = operands.base._replace(bias=None), Needs(True, (True,), (True,))
        out["dx"], (out["da"],), (out["db"],) = module.backward(
            [operands.q.dy], operands.q.x, [base], [operands.adapter], [operands.h], everything
        )

    return forward if op == "forward" else backward


class Trial(NamedTuple):
    """One plan to try."""

    plan: Plan | Sm90Plan
    run: Run


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

    def guard(self) -> AbstractContextManager[Any]:
        """Return a context in which the device is the current one."""

    def job(self, size: Size, op: str) -> Job:
        """Return a pass of a size."""
