"""The base GEMM over a quantised weight on a CPU, from the codes as they are stored.

Few rows of x meet the codes in registers. For many, our own GEMM makes its panels of codes, in fp32, and in bf16 where
the processor multiplies it; or torch's takes a few columns of y at a time, their part of W dequantised into x's dtype.
Where both can, ours is taken unless the other is clearly faster, as on a processor with matrix registers (AMX): it
needs no memory for W. Sums are complete within one GEMM, and never more than `_BLOCK_BYTES` of W exist dequantised.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from lora_kernels import _C
from lora_kernels.backends.cpu.gemm import CODES, KINDS, Gemms, chosen, has_own
from lora_kernels.quant import tables as quant_tables
from lora_kernels.quant.weight import FORMATS, QuantizedWeight

_BLOCK_BYTES = 8 << 20
_MARGIN = 1.05
"""Of torch's time that ours may take and still be chosen."""

_LEVELS = {name: quant_tables.levels(name, torch.device("cpu")) for name in ("nf4", "fp4")}


def quantized_gemm(x: Tensor, w: QuantizedWeight, transposed: bool = False) -> Tensor:
    """x Wᵀ [M,N], or x W [M,K] where `transposed`, fresh and contiguous; x [M,.] in fp32, bf16 or fp16 with unit last
    stride."""
    M, (N, K) = x.shape[0], w.shape
    if not M * N * K:
        return x.new_zeros(M, K if transposed else N)
    y = x.new_empty(M, K if transposed else N)
    if _C.quantized_few(M, transposed):
        _own(x, w, transposed, y)
    elif not has_own(x.dtype):
        _by_blocks(x, w, transposed, y)
    else:
        kind = f"{w.format} {KINDS[x.dtype]}"
        _GEMMS[chosen(_GEMMS, _MARGIN, kind, M, N * K, transposed, x, w, transposed, y)](x, w, transposed, y)
    return y


def few_rows(x: Tensor, w: QuantizedWeight) -> tuple[int, ...] | None:
    """What `_C.forward` takes to compute x Wᵀ itself, in the launch that does the rest: where x has few rows."""
    M, (N, K) = x.shape[0], w.shape
    return _operand(w) if M * N * K and _C.quantized_few(M, False) else None


def dequantize(w: QuantizedWeight, n0: int, n1: int, k0: int, k1: int, out: Tensor) -> Tensor:
    """W[n0:n1, k0:k1] in `out`'s dtype, written to the beginning of `out`, which has room for it; k0 and k1 even."""
    rows, cols = n1 - n0, k1 - k0
    place = (CODES[out.dtype], out.data_ptr(), cols)
    _C.dequantize(torch.get_num_threads(), _operand(w), n0, rows, k0, cols, *place)
    return out[: rows * cols].view(rows, cols)


def _own(x: Tensor, w: QuantizedWeight, transposed: bool, y: Tensor) -> None:
    """csrc/cpu/quant.cpp; x of a dtype that it has, or few rows of any."""
    place = (x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0))
    _C.quantized_gemm(torch.get_num_threads(), CODES[x.dtype], x.shape[0], _operand(w), transposed, *place)


def _by_blocks(x: Tensor, w: QuantizedWeight, transposed: bool, y: Tensor) -> None:
    """torch's GEMM over a part of y's columns at a time."""
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
        torch.mm(x, block, out=y[:, first:last])


def _room(count: int, dtype: torch.dtype) -> Tensor:
    """Memory for a block, which stays with the calling thread: fresh pages cost as much as filling them."""
    nbytes = count * dtype.itemsize
    kept: Tensor | None = getattr(_kept, "room", None)
    if kept is None or kept.nbytes < nbytes:
        kept = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        if nbytes <= _BLOCK_BYTES:
            _kept.room = kept
    return kept[:nbytes].view(dtype)


_kept = threading.local()
_GEMMS: Gemms = {"torch": _by_blocks, "own": _own}


def _operand(w: QuantizedWeight) -> tuple[int, ...]:
    N, K = w.shape
    levels = _LEVELS.get(w.format)
    rows, cols = w.scales.shape if w.format == "fp8" else (1, 1)
    table, absmax, offset = (0, 0, 0) if w.nested is None else (part.data_ptr() for part in w.nested)
    return (
        FORMATS.index(w.format), N, K, w.codes.data_ptr(), 0 if levels is None else levels.data_ptr(),
        w.scales.data_ptr(), rows, cols, w.blocksize, table, absmax, offset,
    )  # fmt: skip
