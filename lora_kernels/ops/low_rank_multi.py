"""`add_low_rank_multi_`: the low-rank half of many adapters, added in place to a y that another program has computed.

    y_m += s_i · B_i (A_i x_m)          i = the adapter of row m; a row without an adapter is not touched

`lora_linear_multi` computes the base product too, and is faster where that can be left to it. A server that has its own
layers, such as vLLM, hands over their results instead. No gradient is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.core.many import AdapterStack
from lora_kernels.core.operands import Adapter
from lora_kernels.core.rows import Rows
from lora_kernels.ops import check, direct
from lora_kernels.ops.autograd import no_graph


def add_low_rank_multi_(
    y: Tensor,
    x: Tensor,
    adapters: Sequence[Adapter | None],
    rows: Rows,
    *,
    backend: str | None = None,
) -> None:
    """Add s_i · (x A_iᵀ) B_iᵀ to the rows of each adapter i in y, in place.

    Args:
        y: [M, N], in x's dtype. It may be columns of a larger tensor.
        x: [M, K].
        adapters: those of an `AdapterStack`, or adapters without dropout in the form that back-ends take. All of one
            dtype: x's, or float32 beside an x in 16 bits. None for one that has nothing in this layer.
        rows: which of the M rows belong to which adapter.
        backend: the name of a back-end, which then serves the call or raises; None for the automatic choice.

    Raises:
        TypeError, ValueError: operands whose dtypes or sizes do not fit together, before anything is written.
    """
    if isinstance(adapters, AdapterStack):  # its adapters fit each other, and have no dropout
        adapters = adapters.slots
        known = [each for each in adapters if each is not None][:1]
    else:
        known = [each for each in adapters if each is not None]
    if not known:
        return
    _check(y, x, known, rows, len(adapters))
    own = y if y.stride()[1] == 1 else y.contiguous()
    with no_graph():
        direct.add_multi(own, x, adapters, rows.padded(len(adapters)), backend)
        if own is not y:
            y.copy_(own)


def _check(y: Tensor, x: Tensor, known: list[Adapter], rows: Rows, n: int) -> None:
    """Raise TypeError or ValueError where the operands do not fit together."""
    (M, K), N = (x.shape, y.shape[-1]) if x.dim() == y.dim() == 2 else ((-1, -1), -1)
    if M < 0 or y.shape[0] != M:
        raise ValueError(f"x must be [M, K] and y [M, N], got {tuple(x.shape)} and {tuple(y.shape)}")
    if rows.M != M or rows.per_sample or rows.n > n:
        raise ValueError(f"{rows!r} does not fit x {tuple(x.shape)} and {n} adapters")
    dtype = x.dtype
    if y.dtype != dtype or y.device != x.device:
        raise TypeError(f"y must have x's dtype and device, got {y.dtype} on {y.device} beside {dtype} on {x.device}")
    first = known[0].a.dtype
    if first != dtype and not (first == torch.float32 and dtype in check.HALVES):
        raise TypeError(f"the adapters must have {dtype}, or float32 beside an x in 16 bits, got {first}")
    for a, b, _, p, _ in known:
        if a.shape != (b.shape[1], K) or b.shape[0] != N:
            raise ValueError(
                f"an adapter must have A [R, {K}] and B [{N}, R], got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if p or a.dtype != first or b.dtype != first:
            raise ValueError(f"the adapters must have no dropout and share a dtype, got p={p}, {a.dtype}, {b.dtype}")
