"""The list contract for back-ends whose kernels serve one base and one adapter: they are called for each pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lora_kernels.core.operands import Adapter, Base, Gradients, MaybeTensors, Needs, Results, Tensors

Forward = Callable[[Tensor, Base, Adapter, bool], tuple[Tensor, Tensor | None]]
"""(x, base, adapter, save_h) -> (y, h)"""
Backward = Callable[
    [Tensor, Tensor | None, Base, Adapter, Tensor | None, Needs], tuple[Tensor | None, Tensor | None, Tensor | None]
]
"""(dy, x, base, adapter, h, needs) -> (dx, da, db), where `needs` has one da and one db"""


def forward_each(
    one: Forward, x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], save_h: Sequence[bool]
) -> Results:
    """Return the (ys, hs) of a back-end's ``forward``, from a function that computes one pair."""
    pairs = [one(x, *each) for each in zip(bases, adapters, save_h, strict=True)]
    return [y for y, _ in pairs], [h for _, h in pairs]


def backward_each(
    one: Backward, dys: Tensors, x: Tensor | None, bases: Sequence[Base], adapters: Sequence[Adapter],
    hs: MaybeTensors, needs: Needs,
) -> Gradients:  # fmt: skip
    """Return the (dx, das, dbs) of a back-end's ``backward``, from a function that computes one pair. dx is summed in
    order."""
    dx: Tensor | None = None
    das, dbs = [], []
    for dy, base, adapter, h, da, db in zip(dys, bases, adapters, hs, needs.da, needs.db, strict=True):
        part, *rest = one(dy, x if da else None, base, adapter, h, Needs(needs.dx, (da,), (db,)))
        dx = part if dx is None or part is None else dx.add_(part)
        das.append(rest[0])
        dbs.append(rest[1])
    return dx, das, dbs
