"""A back-end's forward and backward of one layer, with its operands one by one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from lora_kernels.core.operands import Adapter, Base, Needs


def forward(
    module: ModuleType | Any, x: Tensor, w: Any, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float,
    seed: Tensor | None, save_h: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(y, h)."""
    (y,), (h,) = module.forward(x, [Base(w, bias)], [Adapter(a, b, scale, p, seed)], [save_h])
    return y, h


def backward(
    module: ModuleType | Any, dy: Tensor, x: Tensor | None, w: Any, a: Tensor, b: Tensor, h: Tensor | None,
    scale: float, p: float, seed: Tensor | None, need_dx: bool = True, need_da: bool = True, need_db: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, da, db)."""
    needs = Needs(need_dx, (need_da,), (need_db,))
    dx, (da,), (db,) = module.backward([dy], x, [Base(w)], [Adapter(a, b, scale, p, seed)], [h], needs)
    return dx, da, db
