"""The products of a low-rank half whose h is known, by the kernels of a linear layer: h is their x, and I their A.

    y += s · h Bᵀ          g = dy B, db = dyᵀ h in one pass over dy

The last stride of every operand is 1, and dtypes are fp32, but dy may be in 16 bits. `column_sums` returns
the sums that make up the norm of DoRA over an embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import _C
from lora_kernels.core.operands import Adapter, Base


def add_product(y: Tensor, h: Tensor, b: Tensor, scale: float) -> None:
    """Add scale · h bᵀ to y [M, N] in place, for h [M, R] and b [N, R]."""
    adapter = Adapter(torch.eye(b.shape[1]), b, scale)
    _C.forward(torch.get_num_threads(), h, [Base(b)], [adapter], [y], [None], [False])


def gradients(dy: Tensor, h: Tensor | None, b: Tensor, need_g: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return (g [M, R], db [N, R]) of dy [M, N]. g is None unless `need_g`, db where h is None. One is wanted."""
    N, R = b.shape
    g = dy.new_zeros(dy.shape[0], R) if need_g else None
    db = None if h is None else b.new_empty(N, R)
    adapter = Adapter(torch.eye(R), b, 1.0)
    _C.backward(torch.get_num_threads(), [dy], None, [Base(b)], [adapter], [h], g, [None], [db], [False])
    return g, db


def column_sums(w: Tensor, a_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (‖w‖² by columns [D], a_tᵀ w [R, D], a_tᵀ a_t [R, R]) in fp32 for w [V, D] and a_t [V, R].

    w is read once. Both may be in 16 bits. The bits do not depend on the number of threads.
    """
    D, R = w.shape[1], a_t.shape[1]
    square, low, gram = (torch.empty(*size, dtype=torch.float32) for size in ((D,), (R, D), (R, R)))
    _C.column_sums(torch.get_num_threads(), w, a_t, square, low, gram)
    return square, low, gram
