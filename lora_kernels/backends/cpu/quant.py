"""The base GEMM with a quantised weight on a CPU, from the codes as they are stored.

Few rows of x are multiplied by the codes in registers. For many rows there are two ways. Our own GEMM packs its panels
from the codes, in fp32, and in bf16 where the processor multiplies it. The other way dequantises a part of W into x's
dtype at a time, and torch's GEMM computes its columns of y. Where both serve, ours is taken unless the other is clearly
faster, as on a processor with matrix registers (AMX), because ours needs no memory for W. Every element of y comes from
one GEMM, so no partial sums are rounded, and at most `_BLOCK_BYTES` of W exist dequantised.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from lora_kernels import _C
from lora_kernels.backends.cpu.gemm import DTYPES, Race, chosen
from lora_kernels.quant import tables as quant_tables
from lora_kernels.quant.weight import QuantizedWeight

_BLOCK_BYTES = 8 << 20
"""The size of the part of W that is dequantised at a time."""

for _format, _levels in quant_tables.LEVELS.items():
    _C.set_levels(_format, _levels)


def quantized_gemm(x: Tensor, w: QuantizedWeight, transposed: bool = False, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ [M, N], or x W [M, K] where `transposed`, new and contiguous. A bias may be given for an x in 16
    bits; the sum is rounded once.

    x [M, .] is fp32, bf16 or fp16, and its last stride is 1.
    """
    M, (N, K) = x.shape[0], w.shape
    if not M * N * K:
        return x.new_zeros(M, K if transposed else N)
    y = x.new_empty(M, K if transposed else N)
    if (M <= _C.FEW_ROWS and not transposed) or own_is_chosen(x, w, transposed, y):
        _own(x, w, transposed, y, bias)
    else:
        _by_blocks(x, w, transposed, y, bias)
    return y


def own_is_chosen(x: Tensor, w: QuantizedWeight, transposed: bool, y: Tensor) -> bool:
    """Return whether our own GEMM computes such a product of many rows. `y` has its size, and may be written."""
    if not (y.numel() and x.numel() and _C.has_gemm(x.dtype)):
        return False
    kind = f"{w.format} {DTYPES[x.dtype]}"
    return chosen(_RACE, kind, x.shape[0], w.shape[0] * w.shape[1], transposed, x, w, transposed, y) == "own"


def start(x: Tensor, w: QuantizedWeight, bias: Tensor | None, many: bool = False) -> tuple[Tensor, bool]:
    """Return (y, in_launch). A bias may be given for an x in 16 bits only.

    Where `in_launch` is False, y [M, N] is x Wᵀ + bias, rounded once. Where it is True, y is not yet written, and
    `_C.forward` computes that in its launch: where x has few rows; and, with `many`, where our own GEMM is chosen.
    """
    M, (N, K) = x.shape[0], w.shape
    if M * N * K and M <= _C.FEW_ROWS:
        return x.new_empty(M, N), True
    if many and own_is_chosen(x, w, False, y := x.new_empty(M, N)):
        return y, True
    return quantized_gemm(x, w, bias=bias), False


def dequantize(w: QuantizedWeight, n0: int, n1: int, k0: int, k1: int, out: Tensor) -> Tensor:
    """Return W[n0:n1, k0:k1] in the dtype of `out`, written to the beginning of `out`; k0 and k1 are even."""
    rows, cols = n1 - n0, k1 - k0
    block = out[: rows * cols].view(rows, cols)
    _C.dequantize(torch.get_num_threads(), w, n0, k0, block)
    return block


def _own(x: Tensor, w: QuantizedWeight, transposed: bool, y: Tensor, bias: Tensor | None = None) -> None:
    """Write the product to y, plus the bias, with csrc/cpu/quant.cpp. x has a dtype of `_C.has_gemm`, or few rows of
    any dtype."""
    _C.quantized_gemm(torch.get_num_threads(), x, w, transposed, y, bias)


def _by_blocks(x: Tensor, w: QuantizedWeight, transposed: bool, y: Tensor, bias: Tensor | None = None) -> None:
    """Write the product to y, plus the bias, a few columns at a time, with torch's GEMM."""
    N, K = w.shape
    inner, outer = (N, K) if transposed else (K, N)
    step = min(outer, max(16, _BLOCK_BYTES // (inner * x.element_size()) // 16 * 16))
    room = _room(inner * step, x.dtype)
    for first in range(0, outer, step):
        last = min(outer, first + step)
        if transposed:
            block = dequantize(w, 0, N, first, last, room)
        else:
            block = dequantize(w, first, last, 0, K, room).t()
        if bias is None:
            torch.mm(x, block, out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, block, out=y[:, first:last])


_RACE = Race(_by_blocks, _own, 1.05)
_kept = threading.local()


def _room(count: int, dtype: torch.dtype) -> Tensor:
    """Return memory for `count` elements. It is kept for the next call of the same thread, because new pages take as
    much time as filling them."""
    nbytes = count * dtype.itemsize
    kept: Tensor | None = getattr(_kept, "room", None)
    if kept is None or kept.nbytes < nbytes:
        with torch.inference_mode(False):  # it outlives the mode of the call
            kept = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        if nbytes <= _BLOCK_BYTES:
            _kept.room = kept
    return kept[:nbytes].view(dtype)
