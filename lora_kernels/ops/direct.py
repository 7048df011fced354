"""The call of the back-end that serves it, with nothing in between.

`registered` has the same functions, by the operators that torch knows. Each of those operators runs the function of the
same name here.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Adapter, Base, Call, Gradients, MaybeTensors, Needs, Results, Tensors, call_of


def forward(x: Tensor, base: Base, adapter: Adapter, backend: str | None, save_h: bool) -> tuple[Tensor, Tensor | None]:
    """Return (y [M, N], h [M, R]); h is None unless `save_h`."""
    serving = dispatch.pick(call_of("forward", x, base, adapter), backend)
    (y,), (h,) = serving.forward(x, [base], [adapter], [save_h])
    return y, h


def backward(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, h: Tensor | None, needs: Needs, backend: str | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx [M, K], da [R, K], db [N, R]); None for what `needs` does not ask for."""
    serving = dispatch.pick(call_of("backward", dy, base, adapter), backend)
    dx, (da,), (db,) = serving.backward([dy], x, [base], [adapter], [h], needs)
    return dx, da, db


def keep_mask(x: Tensor, p: float, seed: Tensor, backend: str | None) -> Tensor:
    """Return the dropout mask of x [M, K] as numbers 0 and 1 in x's dtype, by the back-end that would serve a layer
    over x."""
    call = Call("backward", x.device, x.dtype, x.dtype, x.shape[0], 8, x.shape[1], 1, True)
    return dispatch.pick(call, backend).keep_mask(x, p, seed)


def base_gemm(x: Tensor, w: Tensor, backend: str | None) -> Tensor:
    """Return x Wᵀ [M, N], by the back-end that would serve a layer over W."""
    call = Call("forward", x.device, x.dtype, x.dtype, x.shape[0], w.shape[0], w.shape[1], 1, False)
    return dispatch.pick(call, backend).base_gemm(x, w)


def forward_group(
    x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], backend: str | None, save_h: Sequence[bool]
) -> Results:
    """Return (ys, hs) of layers that read one x. Where several back-ends serve them, each is called for its own."""
    serving = _serving("forward", x, bases, adapters, backend)
    if len(set(serving)) == 1:
        return serving[0].forward(x, bases, adapters, save_h)
    ys, hs = [], []
    for module, base, adapter, save in zip(serving, bases, adapters, save_h, strict=True):
        (y,), (h,) = module.forward(x, [base], [adapter], [save])
        ys.append(y)
        hs.append(h)
    return ys, hs


def backward_group(
    dys: Tensors, x: Tensor | None, bases: Sequence[Base], adapters: Sequence[Adapter], hs: MaybeTensors, needs: Needs,
    backend: str | None,
) -> Gradients:  # fmt: skip
    """Return (dx, das, dbs) of layers that read one x; dx is the sum over all of them."""
    serving = _serving("backward", dys[0], bases, adapters, backend)
    if len(set(serving)) == 1:
        return serving[0].backward(dys, x, bases, adapters, hs, needs)
    dx, das, dbs = None, [], []
    for module, dy, base, adapter, h, da, db in zip(serving, dys, bases, adapters, hs, needs.da, needs.db, strict=True):
        part, *rest = module.backward([dy], x if da else None, [base], [adapter], [h], Needs(needs.dx, (da,), (db,)))
        dx = part if dx is None else dx.add_(part)
        das += rest[0]
        dbs += rest[1]
    return dx, das, dbs


def _serving(
    op: str, rows: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], backend: str | None
) -> list[ModuleType]:
    """Return the back-end of each layer."""
    return [
        dispatch.pick(call_of(op, rows, base, adapter), backend) for base, adapter in zip(bases, adapters, strict=True)
    ]
