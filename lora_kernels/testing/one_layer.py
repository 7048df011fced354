"""Forward and backward of a back-end for a single layer: they pass lists of one, and return what is in them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.testing.judge import Problem

ALL = Needs(True, (True,), (True,))
"""Every gradient of one layer."""


def forward_of(module: ModuleType | Any, q: Problem, save_h: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return (y, h) of a problem; h is None unless `save_h`."""
    (y,), (h,) = module.forward(q.x, [q.base], [q.adapter], [save_h])
    return y, h


def backward_of(
    module: ModuleType | Any, q: Problem, h: Tensor | None, needs: Needs = ALL
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, da, db) of a problem; None for each that is not needed. x is passed where da is needed, h where db
    is."""
    x, h = q.x if needs.da[0] else None, h if needs.db[0] else None
    dx, (da,), (db,) = module.backward([q.dy], x, [Base(q.w)], [q.adapter], [h], needs)
    return dx, da, db


def forward(
    module: ModuleType | Any, x: Tensor, w: Any, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float,
    seed: Tensor | None, save_h: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (y, h) of single operands: those of a `Problem`, or others beside a quantised w."""
    (y,), (h,) = module.forward(x, [Base(w, bias)], [Adapter(a, b, scale, p, seed)], [save_h])
    return y, h


def backward(
    module: ModuleType | Any, dy: Tensor, x: Tensor | None, w: Any, a: Tensor, b: Tensor, h: Tensor | None,
    scale: float, p: float, seed: Tensor | None, need_dx: bool = True, need_da: bool = True, need_db: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return (dx, da, db) of single operands, as `forward` takes them."""
    needs = Needs(need_dx, (need_da,), (need_db,))
    dx, (da,), (db,) = module.backward([dy], x, [Base(w)], [Adapter(a, b, scale, p, seed)], [h], needs)
    return dx, da, db
