"""The low-rank half alone, on a CPU, added to a y that another program has computed."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import _C
from lora_kernels.backends.cpu.multi import NOTHING
from lora_kernels.core.operands import Adapter, Needs


def add_low_rank(y: Tensor, x: Tensor, adapter: Adapter, save_h: bool) -> Tensor | None:
    """Add s · h bᵀ to y [M, N], which has x's dtype and contiguous rows, and return h; None unless `save_h`."""
    a = adapter.a
    h = a.new_empty(x.shape[0], a.shape[0]) if save_h else None
    x = x if x.stride()[1] == 1 else x.contiguous()
    _C.forward(torch.get_num_threads(), x, [NOTHING], [adapter], [y], [h], [False])
    return h


def low_rank_backward(
    dy: Tensor, x: Tensor | None, adapter: Adapter, h: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, da, db) of the low-rank half; None for each that is not needed."""
    a, b = adapter.a, adapter.b
    dx = dy.new_zeros(dy.shape[0], a.shape[1]) if needs.dx else None
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if needs.da[0] else None
    db = torch.empty_like(b, memory_format=torch.contiguous_format) if needs.db[0] else None
    dy = dy if dy.stride()[1] == 1 else dy.contiguous()
    _C.backward(torch.get_num_threads(), [dy], x, [NOTHING], [adapter], [h], dx, [da], [db], [False])
    return dx, da, db
