"""The low-rank half of a forward: h = c · (keep ⊙ x) aᵀ, then y₀ = bias + s · h bᵀ. Not yet run on a GPU.

A launch serves a list of layers that read the same x. What belongs to one layer is an entry of a tuple. Arrays of parts
are matrices of fp32 with rows of CHUNKS · BLOCK_R numbers, which is R rounded up; they are named by their first row.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from lora_kernels.backends.triton.kernels.blocks import load_tile, store_tile
from lora_kernels.backends.triton.kernels.product import keep_x


@triton.jit
def number(code):
    """Return the number that `layout.codes_of` made a code of."""
    return code // 2 - 1


@triton.jit
def rounded(tile, PRECISION: tl.constexpr):
    """Return an operand of a product as its precision takes it: with "tf32" an fp32 tile is rounded to nearest. Tensor
    cores would cut the lower bits off, and the errors of a sum would not cancel."""
    if PRECISION == "tf32" and tile.dtype == tl.float32:
        bits = tile.to(tl.int32, bitcast=True)
        near = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        tile = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, near, tile)  # not a NaN, which could become a number
    return tile


@triton.jit(do_not_specialize=["M", "first", "steps", "splits"])
def down(
    x, a, part, seed, stride_xm, stride_xk, stride_ar, stride_ak, M, K, R, T, first, steps, splits,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, CHUNKS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """part = (keep ⊙ x) aᵀ of each layer, split over K into `splits` parts of `steps` steps.

    Grid: one program to each block of BLOCK_M rows, part, chunk of the rank and layer. Those that read the same tiles
    of x are neighbours, so that all but the first read them from the L2 cache. The parts of layer i begin at row
    first + i · splits · M.

    Reads x [M, K], a [R, K] and seed; writes part.
    """
    LAYERS: tl.constexpr = len(a)
    layer, rest = tl.program_id(0) % LAYERS, tl.program_id(0) // LAYERS
    chunk, rest = rest % CHUNKS, rest // CHUNKS
    split, m = rest % splits, rest // splits * BLOCK_M
    r = chunk * BLOCK_R
    start = split * steps * BLOCK_C
    end = min(K, start + steps * BLOCK_C)
    for i in tl.static_range(LAYERS):
        if layer == i:
            key = 0
            if DROPOUT:
                key = tl.load(seed[i])
            acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k in range(start, end, BLOCK_C):
                x_tile = load_tile(x, stride_xm, stride_xk, m, k, M, end, BLOCK_M, BLOCK_C)
                a_tile = load_tile(a[i], stride_ak[i], stride_ar[i], k, r, end, R[i], BLOCK_C, BLOCK_R)
                if DROPOUT:
                    x_tile = keep_x(x_tile, key, m, k, T[i], BLOCK_M, BLOCK_C)
                # x is converted to the adapters' dtype, not they to its
                x_tile, a_tile = rounded(x_tile.to(a_tile.dtype), PRECISION), rounded(a_tile, PRECISION)
                acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION)
            RANK: tl.constexpr = CHUNKS * BLOCK_R
            at = part + (first + (i * splits + split).to(tl.int64) * M) * RANK
            store_tile(at, RANK, 1, acc, m, r, M, RANK, BLOCK_M, BLOCK_R)


@triton.jit
def sum_of_parts(part, first, parts, C, i, j, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, RANK: tl.constexpr):
    """Return the sum over `parts` matrices [C, RANK] of the tile at (i, j), zero outside C. The first matrix begins at
    row `first`. They are added in their order, so the bits are the same in every run."""
    total = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    at = part + tl.cast(first, tl.int64) * RANK
    for _ in range(parts):
        total += load_tile(at, RANK, 1, i, j, C, RANK, BLOCK_I, BLOCK_J)
        at += tl.cast(C, tl.int64) * RANK
    return total


@triton.jit(do_not_specialize=["M", "splits"])
def up(
    part, b, bias, h, y, stride_bn, stride_br, stride_bias, M, N, R, scale, c, save_h, has_bias, splits, steps, ranges,
    ends,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, CHUNKS: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h [M, R] = c · Σ part and y [M, N] = bias + s · h bᵀ of each layer, or with ADD y += s · h bᵀ.

    Grid: one program to each block of BLOCK_M rows and range of `steps` blocks of columns of y, layer after layer.
    Layer i has `ranges` such ranges, and its programs end at number `ends`. These three are codes (`number`).

    Reads part, b, bias where `has_bias`, and y with ADD; writes y, contiguous, and h where `save_h`.
    """
    program = tl.program_id(0)
    RANK: tl.constexpr = CHUNKS * BLOCK_R
    for i in tl.static_range(len(b)):
        begin = 0 if i == 0 else number(ends[i - 1])
        if (program >= begin) & (program < number(ends[i])):
            m = (program - begin) // number(ranges[i]) * BLOCK_M
            start = (program - begin) % number(ranges[i]) * number(steps[i]) * BLOCK_C
            end = min(N[i], start + number(steps[i]) * BLOCK_C)
            first = tl.cast(i * splits, tl.int64) * M
            wide: tl.constexpr = b[i].dtype.element_ty
            if CHUNKS == 1:
                # h = c · Σ part, rounded to its dtype
                h_tile = (sum_of_parts(part, first, splits, M, m, 0, BLOCK_M, BLOCK_R, RANK) * c[i]).to(wide)
                if (save_h[i] != 0) & (start == 0):
                    store_tile(h[i], R[i], 1, h_tile, m, 0, M, R[i], BLOCK_M, BLOCK_R)
            for n in range(start, end, BLOCK_C):
                acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
                for chunk in tl.static_range(CHUNKS):
                    r = chunk * BLOCK_R
                    if CHUNKS > 1:
                        h_tile = (sum_of_parts(part, first, splits, M, m, r, BLOCK_M, BLOCK_R, RANK) * c[i]).to(wide)
                        if (save_h[i] != 0) & (n == 0):
                            store_tile(h[i], R[i], 1, h_tile, m, r, M, R[i], BLOCK_M, BLOCK_R)
                    b_tile = load_tile(b[i], stride_br[i], stride_bn[i], r, n, R[i], end, BLOCK_R, BLOCK_C)
                    acc = tl.dot(rounded(h_tile, PRECISION), rounded(b_tile, PRECISION), acc, input_precision=PRECISION)
                if ADD:
                    # y += s · h bᵀ
                    add = load_tile(y[i], N[i], 1, m, n, M, end, BLOCK_M, BLOCK_C).to(tl.float32)
                else:
                    # y = bias + s · h bᵀ
                    col = n + tl.arange(0, BLOCK_C)
                    at = bias[i] + col.to(tl.int64) * stride_bias[i]
                    add = tl.load(at, mask=(col < end) & (has_bias[i] != 0), other=0.0).to(tl.float32)[None, :]
                store_tile(y[i], N[i], 1, acc * scale[i] + add, m, n, M, end, BLOCK_M, BLOCK_C)
