"""A back-end's forward and backward over lists of layers, from functions that compute one layer.

They are for back-ends whose kernels serve one base and one adapter at a time.
"""

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
    """Return the (ys, hs) of a back-end's ``forward``. `one` computes one layer."""
    results = [one(x, *layer) for layer in zip(bases, adapters, save_h, strict=True)]
    return [y for y, _ in results], [h for _, h in results]


def backward_each(
    one: Backward, dys: Tensors, x: Tensor | None, bases: Sequence[Base], adapters: Sequence[Adapter],
    hs: MaybeTensors, needs: Needs,
) -> Gradients:  # fmt: skip
    """Return the (dx, das, dbs) of a back-end's ``backward``. `one` computes one layer, and dx is summed in the layers'
    order."""
    dx: Tensor | None = None
    das, dbs = [], []
    for dy, base, adapter, h, da, db in zip(dys, bases, adapters, hs, needs.da, needs.db, strict=True):
        part, *rest = one(dy, x if da else None, base, adapter, h, Needs(needs.dx, (da,), (db,)))
        dx = part if dx is None or part is None else dx.add_(part)
        das.append(rest[0])
        dbs.append(rest[1])
    return dx, das, dbs
