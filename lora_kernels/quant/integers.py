"""The layouts of weights in integers that other packages have quantised: W = (code - zero) · scale.

    int8-group    codes int8 [N, K] (torchao)
    uint8-group   codes uint8 [N, K] (HQQ, 8 bits)
    uint4-group   codes uint8 [N/2, K], the first half of the rows in the high nibbles and the second in the low ones
                  (HQQ, 4 bits)
    gptq4, gptq8  codes int32 [K·bits/32, N], with 32/bits elements of one row of W in each, the lowest bits first
    awq4          codes int32 [K, N/8], with 8 elements of one column of W in each, in the order 0 2 4 6 1 3 5 7

In the first three a scale, and a zero, belongs to each `blocksize` consecutive elements of row-major W. In the others
scales are [groups, N], and column k has those of group k // blocksize, or of group order[k] where GPTQ has reordered
the columns (act-order). Zeros are numbers of any dtype below, or packed as the codes are, along N.

(code - zero) and its product with the scale are each rounded to the dtype of the scales. These are the bits that HQQ
and gptqmodel dequantise to.

Badri and Shaji, "Half-Quadratic Quantization", 2023 (https://mobiusml.github.io/hqq_blog). Frantar, Ashkboos, Hoefler
and Alistarh, "GPTQ", 2022 (arXiv:2210.17323). Lin et al., "AWQ", 2023 (arXiv:2306.00978).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CODES = {
    "int8-group": torch.int8,
    "uint8-group": torch.uint8,
    "uint4-group": torch.uint8,
    "gptq4": torch.int32,
    "gptq8": torch.int32,
    "awq4": torch.int32,
}
"""Each format of a weight in integers, and the dtype of its codes."""
TURNED = ("gptq4", "gptq8", "awq4")
"""The formats whose codes lie by columns of W."""
ZEROS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where the eight elements of a word of AWQ lie in it, in their order."""


class Integers(NamedTuple):
    """The parts of a weight in integers beside its codes and scales. A tensor without elements stands for one that the
    weight does not have."""

    zeros: Tensor
    """As many as there are scales, in one of `ZEROS`; or int32, packed along N, beside codes that lie by columns."""
    order: Tensor
    """The group of each column of W: int32 [K]."""


def shape_of(codes: Tensor, format: str) -> tuple[int, int]:
    """Return (N, K) of the weight with these codes."""
    first, second = codes.shape
    if format == "awq4":
        return second * 8, first
    if format in TURNED:
        return second, first * _per_word(format)
    return (2 * first if format == "uint4-group" else first), second


def codes_shape(shape: tuple[int, int], format: str) -> tuple[int, int]:
    """Return the shape of the codes of a weight of this shape. Raises ValueError where it is not whole words."""
    N, K = shape
    if format == "uint4-group":
        if N % 2:
            raise ValueError(f"uint4-group has an even number of rows, got {shape}")
        return N // 2, K
    if format not in TURNED:
        return N, K
    if N % 8 or (format != "awq4" and K % _per_word(format)):
        raise ValueError(f"{format} packs 8 rows of W in whole words, and {_per_word(format)} columns; got {shape}")
    return (K, N // 8) if format == "awq4" else (K // _per_word(format), N)


def scales_shape(shape: tuple[int, int], format: str, blocksize: int) -> tuple[int, ...]:
    """Return the shape of the scales where no order of the columns tells the number of groups."""
    N, K = shape
    return (-(-K // blocksize), N) if format in TURNED else (-(-N * K // blocksize),)


def rows(
    codes: Tensor,
    scales: Tensor,
    parts: Integers,
    format: str,
    shape: tuple[int, int],
    blocksize: int,
    n0: int,
    n1: int,
) -> Tensor:
    """Return the rows ``n0:n1`` of W, in the dtype of the scales: [n1 - n0, K]."""
    dtype, (N, K) = scales.dtype, shape
    if format in TURNED:
        return _columns(codes, scales, parts, format, blocksize)[:, n0:n1].t().contiguous()
    if format == "uint4-group":
        half = N // 2
        part = [codes[n0 : min(n1, half)] >> 4, codes[max(n0, half) - half : max(n1, half) - half] & 15]
        q = torch.cat([piece for piece in part if piece.shape[0]]) if n1 > n0 else codes[:0]
    else:
        q = codes[n0:n1]
    block = torch.arange(n0 * K, n1 * K, device=codes.device) // blocksize
    w = q.to(dtype).reshape(-1)
    if parts.zeros.numel():
        w = w - parts.zeros.to(dtype)[block]
    return (w * scales[block]).view(n1 - n0, K)


def _columns(codes: Tensor, scales: Tensor, parts: Integers, format: str, blocksize: int) -> Tensor:
    """Return Wᵀ [K, N] in the dtype of the scales."""
    N, K = shape_of(codes, format)
    bits = 32 // _per_word(format)
    shifts = torch.tensor(
        _AWQ_SHIFTS if format == "awq4" else range(0, 32, bits), dtype=torch.int32, device=codes.device
    )
    mask, along_n = (1 << bits) - 1, shifts[None, None, :]
    if format == "awq4":
        q = (codes[:, :, None] >> along_n & mask).view(K, N)
    else:
        q = (codes[:, None, :] >> shifts[None, :, None] & mask).reshape(K, N)
    ordered = parts.order.numel() > 0
    group = parts.order.long() if ordered else torch.arange(K, device=codes.device) // blocksize
    w = q.to(scales.dtype)
    if parts.zeros.numel():
        zeros = parts.zeros
        if zeros.dtype == torch.int32:
            zeros = (zeros[:, :, None] >> along_n & mask).reshape(scales.shape)
        w = w - zeros.to(scales.dtype)[group]
    return w * scales[group]


def _per_word(format: str) -> int:
    return 4 if format == "gptq8" else 8
