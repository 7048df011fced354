"""Functions that choose the back-end for a call and call it.

`registered` has functions of the same names and arguments, which call operators that torch knows. Such an operator runs
the function of its own name here, so both ways end in the same code. A caller takes this way where `watched` says that
nothing observes the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from lora_kernels.backends import dispatch
from lora_kernels.backends.each import backward_each, forward_each
from lora_kernels.core.operands import (
    Adapter,
    Base,
    Call,
    ExpertGradients,
    Gradients,
    MaybeTensors,
    MultiResult,
    Needs,
    Results,
    Tensors,
    call_of,
    call_of_experts,
    call_of_multi,
    power_of_two,
)
from lora_kernels.core.rows import Rows
from lora_kernels.quant.weight import QuantizedWeight


def forward(x: Tensor, base: Base, adapter: Adapter, backend: str | None, save_h: bool) -> tuple[Tensor, Tensor | None]:
    """Return (y [M, N], h [M, R]) of one layer; h is None unless `save_h`."""
    module = dispatch.pick(call_of("forward", x, base, adapter), backend)
    (y,), (h,) = module.forward(x, [base], [adapter], [save_h])
    return y, h


def backward(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, h: Tensor | None, needs: Needs, backend: str | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx [M, K], da [R, K], db [N, R]) of one layer; a gradient that `needs` does not ask for is None."""
    module = dispatch.pick(call_of("backward", dy, base, adapter), backend)
    dx, (da,), (db,) = module.backward([dy], x, [base], [adapter], [h], needs)
    return dx, da, db


def keep_mask(x: Tensor, p: float, seed: Tensor, backend: str | None) -> Tensor:
    """Return the dropout mask of x [M, K] as numbers 0 and 1 in x's dtype, from the back-end that would serve the
    backward of a layer over x."""
    # A mask does not depend on the sizes N and R of a layer. Every kernel takes 8 and 1.
    call = Call("backward", x.device, x.dtype, x.dtype, x.shape[0], 8, x.shape[1], 1, True)
    return dispatch.pick(call, backend).keep_mask(x, p, seed)


def base_gemm(
    x: Tensor,
    w: Tensor | QuantizedWeight,
    backend: str | None,
    bias: Tensor | None = None,
    adapter_dtype: torch.dtype | None = None,
    transposed: bool = False,
) -> Tensor:
    """Return x Wᵀ + bias [M, N], or x W [M, K] where `transposed`, from the back-end that would serve a layer of rank 1
    over W, with adapters in x's dtype where `adapter_dtype` is None. A bias may be given for an x in 16 bits only, and
    not beside `transposed`."""
    M, (N, K), dtypes = x.shape[0], w.shape, (x.dtype, adapter_dtype or x.dtype)
    M = 1 << (M - 1).bit_length() if M else 0  # `power_of_two`, without the time of a call
    w_format = w.format if isinstance(w, QuantizedWeight) else "dense"
    call = Call("forward", x.device, *dtypes, M, N, K, 1, False, w_format)
    return dispatch.pick(call, backend).base_gemm(x, w, bias, transposed)


def forward_group(
    x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], backend: str | None, save_h: Sequence[bool]
) -> Results:
    """Return (ys, hs) of layers that read the same x, by one call where one back-end serves all of them."""
    module = _serving_all("forward", x, bases, adapters, backend)
    if module is not None:
        return module.forward(x, bases, adapters, save_h)

    def one(x: Tensor, base: Base, adapter: Adapter, save_h: bool) -> tuple[Tensor, Tensor | None]:
        return forward(x, base, adapter, backend, save_h)

    return forward_each(one, x, bases, adapters, save_h)


def backward_group(
    dys: Tensors, x: Tensor | None, bases: Sequence[Base], adapters: Sequence[Adapter], hs: MaybeTensors, needs: Needs,
    backend: str | None,
) -> Gradients:  # fmt: skip
    """Return (dx, das, dbs) of layers that read the same x, by one call where one back-end serves all of them. dx is
    the sum over the layers."""
    module = _serving_all("backward", dys[0], bases, adapters, backend)
    if module is not None:
        return module.backward(dys, x, bases, adapters, hs, needs)

    def one(
        dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, h: Tensor | None, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return backward(dy, x, base, adapter, h, needs, backend)

    return backward_each(one, dys, x, bases, adapters, hs, needs)


def forward_multi(
    x: Tensor, base: Base, adapters: Sequence[Adapter | None], rows: Rows, backend: str | None, save_h: bool
) -> MultiResult:
    """Return (y [M, N], h) of one layer with many adapters; h is None unless `save_h`."""
    module = dispatch.pick(call_of_multi("forward_multi", x, base, adapters), backend)
    return module.forward_multi(x, base, adapters, rows, save_h)


def backward_multi(
    dy: Tensor, x: Tensor | None, base: Base, adapters: Sequence[Adapter | None], rows: Rows, h: Tensor | None,
    needs: Needs, backend: str | None,
) -> Gradients:  # fmt: skip
    """Return (dx, das, dbs) of one layer with many adapters; a gradient that `needs` does not ask for is None."""
    module = dispatch.pick(call_of_multi("backward_multi", dy, base, adapters), backend)
    return module.backward_multi(dy, x, base, adapters, rows, h, needs)


def forward_experts(
    x: Tensor, base: Base, adapter: Adapter, rows: Rows, backend: str | None, save_h: bool
) -> MultiResult:
    """Return (y [M, N], h [M, R]) of a layer of experts; h is None unless `save_h`."""
    module = dispatch.pick(call_of_experts("forward_experts", x, base, adapter), backend)
    return module.forward_experts(x, base, adapter, rows, save_h)


def backward_experts(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, rows: Rows, h: Tensor | None, needs: Needs,
    backend: str | None,
) -> ExpertGradients:  # fmt: skip
    """Return (dx [M, K], da [E, R, K], db [E, N, R]) of a layer of experts; a gradient that `needs` does not ask for is
    None."""
    module = dispatch.pick(call_of_experts("backward_experts", dy, base, adapter), backend)
    return module.backward_experts(dy, x, base, adapter, rows, h, needs)


def add_multi(y: Tensor, x: Tensor, adapters: Sequence[Adapter | None], rows: Rows, backend: str | None) -> None:
    """Add the low-rank half of many adapters, at least one of which is not None, to their rows of y [M, N]."""
    known = [each.a for each in adapters if each is not None]
    (M, N), K, R = y.shape, x.shape[1], max([a.shape[0] for a in known])
    call = Call("add_multi", x.device, x.dtype, known[0].dtype, power_of_two(M), N, K, R, False)
    dispatch.pick(call, backend).add_multi(y, x, adapters, rows)


def _serving_all(
    op: str, rows: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], backend: str | None
) -> ModuleType | None:
    """Return the back-end that serves every layer of a group, or None where several are needed."""
    pairs = zip(bases, adapters, strict=True)
    modules = {dispatch.pick(call_of(op, rows, base, adapter, len(bases)), backend) for base, adapter in pairs}
    return modules.pop() if len(modules) == 1 else None
