"""Many adapters over the rows of one x, on a CPU: one base product, and one launch for all adapters.

Rows are read where they lie. A tile of rows that are not evenly spaced is copied while it is computed, so that no
operand is permuted as a whole. The results of an adapter depend on its own rows and their order alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import _C
from lora_kernels.backends.cpu import gemm, quant
from lora_kernels.core.many import AdapterStack
from lora_kernels.core.operands import Adapter, Base, Gradients, MultiResult, Needs
from lora_kernels.core.rows import Rows
from lora_kernels.quant.weight import QuantizedWeight

NOTHING = Base(None)  # type: ignore[arg-type]
"""What stands for the base where y holds its product already: no w is read, and no bias is added."""


def forward_multi(x: Tensor, base: Base, adapters: Sequence[Adapter | None], rows: Rows, save_h: bool) -> MultiResult:
    """Return (y, h). Where a row has no adapter and W is dense, the base product is ``F.linear(x, w, bias)``."""
    if x.stride()[1] != 1:  # the base GEMM and the kernel share one copy
        x = x.contiguous()
    if isinstance(adapters, AdapterStack):
        adapters = adapters.slots
    w, bias = base
    first = bias if x.dtype != torch.float32 else None
    if isinstance(w, QuantizedWeight):
        y, launched = quant.start(x, w, first)
    elif _has_base_rows(adapters, rows):
        y, launched, first = F.linear(x, w, bias), False, bias
    else:
        y, launched = gemm.start(x, w, first)
    h = None
    if save_h:
        known = [(each.a, count) for each, count in zip(adapters, rows.counts, strict=True) if each is not None]
        h = known[0][0].new_empty(sum(a.shape[0] * count for a, count in known))
    rest = base if launched or first is not bias else Base(w)
    _C.forward_multi(torch.get_num_threads(), x, rest, adapters, rows.order, rows.starts, y, h, launched)
    return y, h


def add_multi(y: Tensor, x: Tensor, adapters: Sequence[Adapter | None], rows: Rows) -> None:
    if x.stride()[1] != 1:
        x = x.contiguous()
    if isinstance(adapters, AdapterStack):
        adapters = adapters.slots
    _C.forward_multi(torch.get_num_threads(), x, NOTHING, adapters, rows.order, rows.starts, y, None, False)


def backward_multi(
    dy: Tensor,
    x: Tensor | None,
    base: Base,
    adapters: Sequence[Adapter | None],
    rows: Rows,
    h: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Return (dx, das, dbs). The gradients of an adapter without rows are None."""
    if dy.stride()[1] != 1:  # the base GEMM and the kernel share one copy
        dy = dy.contiguous()
    if isinstance(adapters, AdapterStack):
        adapters = adapters.slots
    das: list[Tensor | None] = []
    dbs: list[Tensor | None] = []
    for adapter, count, need_da, need_db in zip(adapters, rows.counts, needs.da, needs.db, strict=True):
        wanted = adapter if count else None
        das.append(wanted.a.new_empty(wanted.a.shape) if wanted is not None and need_da else None)
        dbs.append(wanted.b.new_empty(wanted.b.shape) if wanted is not None and need_db else None)
    w, dx, launched = base.w, None, False
    if needs.dx and isinstance(w, QuantizedWeight):
        dx = quant.quantized_gemm(dy, w, transposed=True)
    elif needs.dx and isinstance(w, Tensor):
        launched = gemm.is_small_backward(dy, w)
        dx = dy.new_empty(dy.shape[0], w.shape[1]) if launched else gemm.base_gemm(dy, w.t())
    order, starts = rows.order, rows.starts
    _C.backward_multi(torch.get_num_threads(), dy, x, base, adapters, order, starts, h, dx, das, dbs, launched)
    return dx, das, dbs


def _has_base_rows(adapters: Sequence[Adapter | None], rows: Rows) -> bool:
    """Return whether a row of x has no adapter in this layer."""
    if sum(rows.counts) < rows.M:
        return True
    if None not in adapters:
        return False
    return any(count and each is None for each, count in zip(adapters, rows.counts, strict=True))
