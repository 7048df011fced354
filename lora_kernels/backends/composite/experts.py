"""The experts of one layer: the base products of all, and the launches of `multi_pass` for their adapters. Not yet run
on a GPU.

The base products are one grouped GEMM of torch where that is made for the operands (`_grouped`). It reads the rows of
each expert on the GPU, so that nothing waits, and a CUDA graph may be replayed for another division of the rows.
Otherwise they are one GEMM after the other, for which the numbers of rows must be known on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.backends import eager_experts
from lora_kernels.backends.composite import adapter_table, multi_pass
from lora_kernels.backends.triton.device import Target, find_target
from lora_kernels.core.operands import Adapter, Base, ExpertGradients, MultiResult, Needs
from lora_kernels.core.rows import Rows

_BYTES = 16
"""torch's grouped GEMM takes rows that begin at multiples of so many bytes."""


def forward_experts(x: Tensor, base: Base, adapter: Adapter, rows: Rows, save_h: bool) -> MultiResult:
    """Return (y, h). The rows of h without an expert are not written."""
    target = find_target(x.device)
    assert target is not None, "dispatch asks why_not first"
    (w, bias), a = base, adapter.a
    assert isinstance(w, Tensor), "no experts are quantised"
    with target.guard():
        y = _product(target, x, w, bias, rows)
        h = a.new_empty(x.shape[0], a.shape[1]) if save_h else None
        multi_pass.low_rank(target.gpu, multi_pass.FORWARD, x, adapter_table.make_stack(adapter), rows, h, y)
    return y, h


def backward_experts(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, rows: Rows, h: Tensor | None, needs: Needs
) -> ExpertGradients:
    """Return (dx, da, db). Those of an expert without rows are zeros."""
    target = find_target(dy.device)
    assert target is not None, "dispatch asks why_not first"
    w, (a, b, *_) = base.w, adapter
    assert isinstance(w, Tensor), "no experts are quantised"
    need_dx, (need_da,), (need_db,) = needs
    with target.guard():
        dx = _product(target, dy, w.transpose(1, 2), None, rows) if need_dx else None
        da = torch.empty_like(a, memory_format=torch.contiguous_format) if need_da else None
        db = torch.empty_like(b, memory_format=torch.contiguous_format) if need_db else None
        table = adapter_table.make_stack(adapter, da, db)
        if need_dx or need_da:
            g = a.new_empty(dy.shape[0], a.shape[1]) if need_da else None
            multi_pass.low_rank(target.gpu, multi_pass.BACKWARD, dy, table, rows, g, dx)
            if g is not None:
                assert x is not None
                multi_pass.gradients(target.gpu, "a", x, table, rows, g)
        if need_db:
            assert h is not None
            multi_pass.gradients(target.gpu, "b", dy, table, rows, h)
    return dx, da, db


def _product(target: Target, x: Tensor, w: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
    """Return x_e w_eᵀ + bias_e in the rows of each expert, and zeros in the rest."""
    capturing = target.capturing()
    if bias is None and _grouped(target, x, w):
        y = F.grouped_mm(x, w.transpose(1, 2), offs=rows.starts[1:])
        if not capturing and rows.known_counts is not None:
            eager_experts.without_rest(y, rows)
        else:
            nobody = torch.arange(rows.M, dtype=torch.int32, device=x.device) >= rows.starts[-1]
            y.masked_fill_(nobody[:, None], 0)
        return y
    if capturing:
        raise RuntimeError(
            "experts can be captured into a CUDA graph where torch's grouped GEMM serves them: in bfloat16, without a "
            f"bias, with N and K in multiples of 8; got {x.dtype}, weight {w.dtype} {tuple(w.shape)}, "
            f"{'no bias' if bias is None else 'a bias'}"
        )
    y = x.new_empty(x.shape[0], w.shape[1])
    eager_experts.base_forward(y, x, Base(w, bias), rows)
    return y


def _grouped(target: Target, x: Tensor, w: Tensor) -> bool:
    """Return whether torch's grouped GEMM is made for these operands: bf16 on an NVIDIA GPU from sm_80, with one stride
    of 1 and the others in multiples of 16 bytes. In other dtypes it loops over the experts itself."""
    arch = target.gpu.arch
    if not hasattr(F, "grouped_mm") or not arch.startswith("sm_") or int(arch[3:]) < 80:
        return False
    if not x.dtype == w.dtype == torch.bfloat16 or not x.shape[0]:
        return False
    by_row = w.stride(2) == 1
    one = x.stride(1) == 1 and (by_row or w.stride(1) == 1)
    strides = x.stride(0), w.stride(0), w.stride(1 if by_row else 2), w.shape[1]  # the last is that of y
    aligned = [x.data_ptr(), w.data_ptr(), *(each * x.element_size() for each in strides)]
    return one and all(each % _BYTES == 0 for each in aligned)
