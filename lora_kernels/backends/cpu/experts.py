"""The experts of one layer, on a CPU: the base product of each over its own rows, and one launch for all adapters.

The kernels of the low-rank half are those of `multi`, whose adapters are here the matrices of two stacks. A stack of B
whose rows and columns are both strided, as PEFT stores it, is copied once, as Bᵀ.

The base products are one GEMM of torch after the other, or all of our own in one launch, in which a thread computes
whole products: whichever is faster for such a call, as in `gemm`. A W of another dtype is converted expert by expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import _C
from lora_kernels.backends import eager_experts
from lora_kernels.backends.cpu import gemm
from lora_kernels.backends.eager_experts import without_rest
from lora_kernels.core.many import panel_stride
from lora_kernels.core.operands import Adapter, Base, ExpertGradients, MultiResult, Needs
from lora_kernels.core.rows import Rows


def forward_experts(x: Tensor, base: Base, adapter: Adapter, rows: Rows, save_h: bool) -> MultiResult:
    """Return (y, h). In fp32 the bias is added with s · h bᵀ, which saves a pass over y."""
    (w, bias), (a, b, scale, p, seed) = base, adapter
    assert isinstance(w, Tensor), "no experts are quantised"
    if x.stride()[1] != 1:  # the base GEMM and the kernel share one copy
        x = x.contiguous()
    M, late = x.shape[0], bias if x.dtype == torch.float32 else None
    y = x.new_empty(M, w.shape[1])
    h = a.new_empty(M, a.shape[1]) if save_h else None
    _product(y, x, w, None if late is not None else bias, rows)
    threads = torch.get_num_threads()
    _C.forward_experts(threads, x, _with_rows(a), _readable(b), scale, p, seed, rows.order, rows.starts, y, h, late)
    return y, without_rest(h, rows)


def backward_experts(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, rows: Rows, h: Tensor | None, needs: Needs
) -> ExpertGradients:
    """Return (dx, da, db). Those of an expert without rows are zeros."""
    w, (a, b, scale, p, seed) = base.w, adapter
    assert isinstance(w, Tensor), "no experts are quantised"
    if dy.stride()[1] != 1:
        dy = dy.contiguous()
    dx = None
    if needs.dx:
        dx = dy.new_empty(dy.shape[0], a.shape[2])
        _product(dx, dy, w.transpose(1, 2), None, rows)
    make = torch.empty if len(rows.used) == len(a) else torch.zeros
    da = make(a.shape, dtype=a.dtype) if needs.da[0] else None
    db = make(b.shape, dtype=b.dtype) if needs.db[0] else None
    x, order, starts = x if needs.da[0] else None, rows.order, rows.starts
    threads = torch.get_num_threads()
    _C.backward_experts(
        threads, dy, x, _with_rows(a), _readable(b), scale, p, seed, order, starts, h, dx, da, db
    )  # fmt: skip
    return dx, da, db


def _product(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, rows: Rows) -> None:
    """Write x_e w_eᵀ + bias_e to the rows of each expert in y, and zeros to the rest. The last stride of x is 1; a bias
    is given in 16 bits only."""
    used = len(rows.used)
    if used and w.dtype == x.dtype and _C.has_gemm(x.dtype):
        M, size, transposed = sum(rows.counts) // used, w.shape[1] * w.shape[2], w.stride()[2] != 1
        kind = f"{gemm.DTYPES[x.dtype]} experts"
        if gemm.chosen(_RACE, kind, M, size, transposed, y, x, w, bias, rows) == "own":
            _own(y, x, w, bias, rows)
            return
    _torch(y, x, w, bias, rows)


def _own(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, rows: Rows) -> None:
    _C.gemm_experts(torch.get_num_threads(), x, w, rows.order, rows.starts, y, bias)
    without_rest(y, rows)


def _torch(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, rows: Rows) -> None:
    eager_experts.base_forward(y, x, Base(w, bias), rows)


_RACE = gemm.Race(_torch, _own, 0.95)


def _with_rows(t: Tensor) -> Tensor:
    """Return a stack whose last stride is 1: t itself, or a copy."""
    return t if t.stride()[2] == 1 else t.contiguous()


def _readable(b: Tensor) -> Tensor:
    """Return B with contiguous rows or columns: b itself, or a copy in the layout that kernels read without packing."""
    E, N, R = b.shape
    if 1 in b.stride()[1:]:
        return b
    columns = b.new_empty(E, R, panel_stride(N, b.dtype))[:, :, :N]
    return columns.copy_(b.transpose(1, 2)).transpose(1, 2)
