"""A frozen W in 4 or 8 bits: how a tile of it is dequantised, and the kernel that dequantises all of it. Not yet run
on a GPU.

    nf4, fp4   w = level[code] · absmax of its block of `blocksize` consecutive elements of row-major W
    int8       w = code · absmax of its row / 127
    fp8        w = e4m3 code · scale of W, of its row or of its block of 128 x 128

w has the bits of `QuantizedWeight.dequantize`: the same operations in fp32 in the same order, none of them contracted
(launches set enable_fp_fusion=False), rounded once to x's dtype.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_kernels.backends.triton.kernels.blocks import load_tile, store_tile


class Codes(NamedTuple):
    """A quantised W as an argument of a kernel: pointers, a stride, and constants of the compiler (tl.constexpr). The
    strides of the codes themselves are passed as those of w."""

    codes: Any
    levels: Any
    """The values of the 16 codes of nf4 or fp4."""
    scales: Any
    table: Any
    absmax: Any
    offset: Any
    """table, absmax and offset serve double quantisation: absmax of a block = table[scale] · absmax[block / 256] +
    offset."""
    stride_sn: int
    """The stride from one row of scales to the next; 0 where all rows of W share one."""
    SPAN: Any
    """SPAN divides BLOCK_K. SPAN neighbours of a row, from a multiple of SPAN on, share their scale."""
    FORMAT: Any
    BLOCKSIZE: Any
    """The elements of a block of nf4 or fp4; 128 for fp8 in blocks of 128 x 128, else 0."""
    NESTED: Any


@triton.jit
def load_levels(w):
    """Return the table that `weight_tile` looks codes up in, to be loaded before a loop; 0 where it needs none."""
    level = 0
    if w.FORMAT == "nf4" or w.FORMAT == "fp4":
        level = tl.load(w.levels + tl.arange(0, 16))
    return level


@triton.jit
def scale_tile(w, n, k, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the scale of every SPAN elements of a row in the tile of W at (n, k): fp32 [BLOCK_N, BLOCK_K / SPAN], zero
    outside W. SPAN divides k."""
    row = (n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    col = (tl.arange(0, BLOCK_K // w.SPAN) * w.SPAN + k)[None, :]
    inside = (row < N) & (col < K)
    if w.FORMAT == "nf4" or w.FORMAT == "fp4":
        block = (row * K + col) // w.BLOCKSIZE
    elif w.BLOCKSIZE > 0:
        block = row // w.BLOCKSIZE * w.stride_sn + col // w.BLOCKSIZE
    else:
        block = row * w.stride_sn + tl.zeros_like(col)
    scale = tl.load(w.scales + block, mask=inside, other=0)
    if w.NESTED:
        second = tl.load(w.absmax + block // 256, mask=inside, other=0.0)
        scale = tl.load(w.table + scale.to(tl.int32)) * second + tl.load(w.offset)
        scale = tl.where(inside, scale, 0.0)
    return scale


@triton.jit
def decode_e4m3(code):
    """Return the fp32 values of uint8 codes of e4m3fn: a sign, four bits of exponent with a bias of 7, three bits of
    mantissa. Integers do it, because not every architecture converts e4m3, nor does the interpreter."""
    bits = code.to(tl.int32)
    # As the highest bits of an fp32's exponent and mantissa they are 2^(7 - 127) of the value, subnormals included.
    value = ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def weight_tile(w, level, stride_cn, n, k, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return W[n : n + BLOCK_N, k : k + BLOCK_K] in fp32, zero outside W [N, K]. k is a multiple of BLOCK_K, which is
    even; `level` is the result of `load_levels`."""
    scale = scale_tile(w, n, k, N, K, BLOCK_N, BLOCK_K)
    if w.FORMAT == "nf4" or w.FORMAT == "fp4":
        pair = load_tile(w.codes, stride_cn, 1, n, k // 2, N, K // 2, BLOCK_N, BLOCK_K // 2).to(tl.int32)
        # A gather reads shared memory: 32 loads a step of a thread's 32 elements. Looked up through a pointer, every
        # level would be copied asynchronously on its own; a tree of selections takes 500 instructions.
        code = tl.reshape(tl.join(pair >> 4, pair & 15), (BLOCK_N * BLOCK_K,))
        value = tl.gather(level, code, 0)
    elif w.FORMAT == "int8":
        value = load_tile(w.codes, stride_cn, 1, n, k, N, K, BLOCK_N, BLOCK_K).to(tl.float32)
    else:
        value = decode_e4m3(load_tile(w.codes, stride_cn, 1, n, k, N, K, BLOCK_N, BLOCK_K))
    value = tl.reshape(value, (BLOCK_N, BLOCK_K // w.SPAN, w.SPAN)) * scale[:, :, None]
    if w.FORMAT == "int8":
        value *= 1 / 127
    return tl.reshape(value, (BLOCK_N, BLOCK_K))


@triton.jit
def dequantise(w, out, stride_cn, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out [N, K] = w in out's dtype.

    Grid: one program to each tile [BLOCK_N, BLOCK_K]. Reads the codes and scales; writes out, contiguous.
    """
    cols = tl.cdiv(K, BLOCK_K)
    n, k = tl.program_id(0) // cols * BLOCK_N, tl.program_id(0) % cols * BLOCK_K
    tile = weight_tile(w, load_levels(w), stride_cn, n, k, N, K, BLOCK_N, BLOCK_K)
    store_tile(out, K, 1, tile, n, k, N, K, BLOCK_N, BLOCK_K)
