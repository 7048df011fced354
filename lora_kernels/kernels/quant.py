"""A frozen W in 4 or 8 bits: a tile of it dequantised, and the kernels that read it. Not yet run on a GPU.

    nf4, fp4   w = level[code] · absmax of its block of `blocksize` consecutive elements of row-major W
    int8       w = code · absmax of its row / 127
    fp8        w = e4m3 code · scale of W, of its row or of its block of 128 x 128

w has the bits of `QuantizedWeight.dequantize`: the same operations in fp32 in the same order, none of them contracted
(launches set enable_fp_fusion=False), rounded once to x's dtype.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from lora_kernels.kernels.forward import add_parts, store_redundant
from lora_kernels.kernels.product import keep_x, load_tile, store_tile, swizzle


@triton.jit
def scale_tile(
    scales,
    table,
    absmax,
    offset,
    stride_sn,
    n,
    k,
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
):
    """The scale of every SPAN elements of a row in the tile of W at (n, k): fp32 [BLOCK_N, BLOCK_K / SPAN], zero
    outside W. SPAN divides k and BLOCK_K, and SPAN neighbours from a multiple of it on share their scale."""
    row = (n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    col = (k + SPAN * tl.arange(0, BLOCK_K // SPAN))[None, :]
    inside = (row < N) & (col < K)
    if FORMAT == "nf4" or FORMAT == "fp4":
        block = (row * K + col) // BLOCKSIZE
    elif BLOCKSIZE > 0:
        block = row // BLOCKSIZE * stride_sn + col // BLOCKSIZE
    else:
        block = row * stride_sn + tl.zeros_like(col)
    scale = tl.load(scales + block, mask=inside, other=0)
    if NESTED:
        # absmax of a block = table[code] · absmax[block / 256] + offset
        second = tl.load(absmax + block // 256, mask=inside, other=0.0)
        scale = tl.load(table + scale.to(tl.int32)) * second + tl.load(offset)
        scale = tl.where(inside, scale, 0.0)
    return scale


@triton.jit
def decode_e4m3(code):
    """The fp32 that uint8 codes of e4m3fn stand for: a sign, four bits of exponent with a bias of 7, three of mantissa.
    By integers, because not every architecture and no interpreter converts them."""
    bits = code.to(tl.int32)
    # As the highest bits of an fp32's exponent and mantissa they stand for 2^(7 - 127) of it, subnormals included.
    value = ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def weight_tile(
    codes,
    level,
    scales,
    table,
    absmax,
    offset,
    stride_cn,
    stride_sn,
    n,
    k,
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
):
    """W[n : n + BLOCK_N, k : k + BLOCK_K] in fp32, zero outside W [N,K]. k is a multiple of BLOCK_K, which is even;
    `level` is a tile of what the 16 codes of nf4 or fp4 stand for."""
    scale = scale_tile(
        scales, table, absmax, offset, stride_sn, n, k, N, K, BLOCK_N, BLOCK_K, SPAN, FORMAT, BLOCKSIZE, NESTED
    )
    if FORMAT == "nf4" or FORMAT == "fp4":
        pair = load_tile(codes, stride_cn, 1, n, k // 2, N, K // 2, BLOCK_N, BLOCK_K // 2).to(tl.int32)
        # A gather reads shared memory: 32 loads a step of a thread's 32 elements. Looked up through a pointer, every
        # level would be copied asynchronously on its own; a tree of selections takes 500 instructions.
        code = tl.reshape(tl.join(pair >> 4, pair & 15), (BLOCK_N * BLOCK_K,))
        value = tl.gather(level, code, 0)
    elif FORMAT == "int8":
        value = load_tile(codes, stride_cn, 1, n, k, N, K, BLOCK_N, BLOCK_K).to(tl.float32)
    else:
        value = decode_e4m3(load_tile(codes, stride_cn, 1, n, k, N, K, BLOCK_N, BLOCK_K))
    value = tl.reshape(value, (BLOCK_N, BLOCK_K // SPAN, SPAN)) * scale[:, :, None]
    if FORMAT == "int8":
        value *= 1 / 127
    return tl.reshape(value, (BLOCK_N, BLOCK_K))


@triton.jit
def dequantise(
    codes,
    levels,
    scales,
    table,
    absmax,
    offset,
    w,
    stride_cn,
    stride_sn,
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
):
    """w [N,K], dense and contiguous, one tile to a program."""
    cols = tl.cdiv(K, BLOCK_K)
    n, k = tl.program_id(0) // cols * BLOCK_N, tl.program_id(0) % cols * BLOCK_K
    level = 0
    if FORMAT == "nf4" or FORMAT == "fp4":
        level = tl.load(levels + tl.arange(0, 16))
    tile = weight_tile(
        codes, level, scales, table, absmax, offset, stride_cn, stride_sn, n, k, N, K,
        BLOCK_N, BLOCK_K, SPAN, FORMAT, BLOCKSIZE, NESTED,
    )  # fmt: skip
    store_tile(w, K, 1, tile, n, k, N, K, BLOCK_N, BLOCK_K)


@triton.jit(do_not_specialize=["M", "T", "steps"])
def forward_quantised(
    x,
    codes,
    levels,
    scales,
    table,
    absmax,
    offset,
    a,
    b,
    bias,
    y,
    h,
    seed,
    sync,
    part,
    stride_xm,
    stride_xk,
    stride_cn,
    stride_sn,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_bias,
    M,
    N,
    K,
    R,
    R_up,
    steps,
    scale,
    inverse,
    c,
    T,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPAN: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SAVE_H: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    AMD: tl.constexpr,
):
    """`forward_redundant`, which has the formulae, with W dequantised tile by tile as the K loop comes to it. Every row
    block of x reads all codes once. BLOCK_R >= R."""
    rows, cols = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile, split = tl.program_id(0) % (rows * cols), tl.program_id(0) // (rows * cols)
    pm, pn = swizzle(tile, rows, cols, GROUP_M)
    m, n = pm * BLOCK_M, pn * BLOCK_N
    key = 0
    if DROPOUT:
        key = tl.load(seed)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h_tile = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    level = 0
    if FORMAT == "nf4" or FORMAT == "fp4":
        level = tl.load(levels + tl.arange(0, 16))
    start = split * steps * BLOCK_K
    end = min(K, start + steps * BLOCK_K)
    for k in range(start, end, BLOCK_K):
        x_tile = load_tile(x, stride_xm, stride_xk, m, k, M, end, BLOCK_M, BLOCK_K)
        a_tile = load_tile(a, stride_ak, stride_ar, k, 0, end, R, BLOCK_K, BLOCK_R).to(x_tile.dtype)
        w_tile = weight_tile(
            codes, level, scales, table, absmax, offset, stride_cn, stride_sn, n, k, N, K,
            BLOCK_N, BLOCK_K, SPAN, FORMAT, BLOCKSIZE, NESTED,
        ).to(x_tile.dtype)  # fmt: skip
        # acc = x wᵀ, h = (keep ⊙ x) aᵀ
        acc = tl.dot(x_tile, w_tile.T, acc, input_precision=PRECISION)
        if DROPOUT:
            x_tile = keep_x(x_tile, key, m, k, T, BLOCK_M, BLOCK_K)
        h_tile = tl.dot(x_tile, a_tile, h_tile, input_precision=PRECISION)
    last = True
    if SPLIT:
        parts = tl.cdiv(K, steps * BLOCK_K)
        acc, h_tile, last = add_parts(acc, h_tile, part, sync, tile, split, parts, BLOCK_M, BLOCK_N, BLOCK_R, AMD)
    if last:
        store_redundant(
            acc, h_tile, b, bias, y, h, stride_bn, stride_br, stride_bias, m, n, M, N, R, R_up, scale, inverse, c,
            BLOCK_M, BLOCK_N, BLOCK_R, HAS_BIAS, SAVE_H, PRECISION,
        )  # fmt: skip
