"""The low-rank half of a backward: one pass over dy, one over x, and the sums of their parts. Not yet run on a GPU.

    g = s · dy b    db = s · dyᵀ h    dx₀ = Σ over the layers c · keep ⊙ (g a)    da = c · gᵀ (keep ⊙ x)

What belongs to one layer of a list is an entry of a tuple. Arrays of parts are matrices of fp32 with rows of
CHUNKS · BLOCK_R numbers, which is R rounded up; they are named by their first row.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# ruff: noqa: B007, RUF005 (what Triton compiles)

import triton
import triton.language as tl

from lora_kernels.backends.composite.kernels.forward import number, rounded, sum_of_parts
from lora_kernels.backends.triton.kernels.blocks import load_tile, store_tile
from lora_kernels.backends.triton.kernels.philox import keep_tile


@triton.jit(do_not_specialize=["M", "blocks"])
def pass_over_dy(
    dy, b, h, part, stride_dym, stride_dyn, stride_bn, stride_br, stride_hm, stride_hr,
    M, N, R, first_g, first_db, blocks, ends,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, CHUNKS: tl.constexpr, NEED_G: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of dyᵀ h over ranges of `blocks` row blocks, and with NEED_G parts of dy b over blocks of columns, of each
    layer.

    Grid: one program to each range of rows, block of BLOCK_C columns of dy and chunk of the rank, layer after layer.
    The programs of layer i end at number `ends`. The part of dy b of column block j begins at row first_g + j · M, the
    part of dyᵀ h of row range j at row first_db + j · N. first_g, first_db and ends are codes (`number`).

    Reads dy [M, N], h [M, R], and b [N, R] with NEED_G; writes part.
    """
    program = tl.program_id(0)
    RANK: tl.constexpr = CHUNKS * BLOCK_R
    for i in tl.static_range(len(dy)):
        begin = 0 if i == 0 else number(ends[i - 1])
        if (program >= begin) & (program < number(ends[i])):
            r, rest = (program - begin) % CHUNKS * BLOCK_R, (program - begin) // CHUNKS
            cols = tl.cdiv(N[i], BLOCK_C)
            tile, split = rest % cols, rest // cols
            n = tile * BLOCK_C
            start = split * blocks * BLOCK_M
            end = min(M, start + blocks * BLOCK_M)
            if NEED_G:
                b_tile = load_tile(b[i], stride_bn[i], stride_br[i], n, r, N[i], R[i], BLOCK_C, BLOCK_R)
                b_tile = rounded(b_tile, PRECISION)
                g_part = part + (number(first_g[i]) + tile.to(tl.int64) * M) * RANK
            db = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
            for m in range(start, end, BLOCK_M):
                dy_tile = load_tile(dy[i], stride_dym[i], stride_dyn[i], m, n, end, N[i], BLOCK_M, BLOCK_C)
                h_tile = load_tile(h[i], stride_hm[i], stride_hr[i], m, r, end, R[i], BLOCK_M, BLOCK_R)
                # dy is converted to the adapters' dtype, not they to its
                dy_tile, h_tile = rounded(dy_tile.to(h_tile.dtype), PRECISION), rounded(h_tile, PRECISION)
                if NEED_G:
                    g = tl.dot(dy_tile, b_tile, input_precision=PRECISION)
                    store_tile(g_part, RANK, 1, g, m, r, end, RANK, BLOCK_M, BLOCK_R)
                db = tl.dot(dy_tile.T, h_tile, db, input_precision=PRECISION)
            db_part = part + (number(first_db[i]) + split.to(tl.int64) * N[i]) * RANK
            store_tile(db_part, RANK, 1, db, n, r, N[i], RANK, BLOCK_C, BLOCK_R)


@triton.jit(do_not_specialize=["M", "blocks", "splits"])
def pass_over_x(
    x, a, g, dx, part, seed, stride_xm, stride_xk, stride_ar, stride_ak, M, K, R, T, c, blocks, splits,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, CHUNKS: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DA: tl.constexpr, PRECISION: tl.constexpr, PRECISION_DX: tl.constexpr,
):  # fmt: skip
    """dx [M, K] = Σ over the layers c · keep ⊙ (g a) with NEED_DX, and with NEED_DA parts of (keep ⊙ x)ᵀ g over
    `splits` ranges of `blocks` row blocks.

    Grid: one program to each range of rows and block of BLOCK_C columns of x. Where CHUNKS > 1 there is one layer, and
    either one of NEED_DX and NEED_DA; with NEED_DA there is a program to each chunk of the rank too. g of layer i
    begins at row i · M, and part j of its (keep ⊙ x)ᵀ g at row (i · splits + j) · K.

    Reads a [R, K], g, seed, and x [M, K] with NEED_DA; writes dx, contiguous, and part.
    """
    LAYERS: tl.constexpr = len(a)
    RANK: tl.constexpr = CHUNKS * BLOCK_R
    SHARES: tl.constexpr = CHUNKS if NEED_DA else 1
    r, rest = tl.program_id(0) % SHARES * BLOCK_R, tl.program_id(0) // SHARES
    cols = tl.cdiv(K, BLOCK_C)
    k, split = rest % cols * BLOCK_C, rest // cols
    start = split * blocks * BLOCK_M
    end = min(M, start + blocks * BLOCK_M)
    rows = tl.cast(M, tl.int64) * RANK
    das = ()
    for i in tl.static_range(LAYERS):
        das = das + (tl.zeros((BLOCK_C, BLOCK_R), tl.float32),)
    for m in range(start, end, BLOCK_M):
        low = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        if NEED_DA:
            x_tile = load_tile(x, stride_xm, stride_xk, m, k, end, K, BLOCK_M, BLOCK_C)
        new = ()
        for i in tl.static_range(LAYERS):
            if DROPOUT:
                keep = keep_tile(tl.load(seed[i]), m, k, T[i], BLOCK_M, BLOCK_C)
            if NEED_DX:
                # dx += c · keep ⊙ (g a)
                part_of_low = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
                for chunk in tl.static_range(CHUNKS):
                    j = chunk * BLOCK_R
                    g_tile = load_tile(g + i * rows, RANK, 1, m, j, end, RANK, BLOCK_M, BLOCK_R)
                    a_tile = load_tile(a[i], stride_ar[i], stride_ak[i], j, k, R[i], K, BLOCK_R, BLOCK_C)
                    g_tile, a_tile = rounded(g_tile, PRECISION_DX), rounded(a_tile, PRECISION_DX)
                    part_of_low = tl.dot(g_tile, a_tile, part_of_low, input_precision=PRECISION_DX)
                if DROPOUT:
                    low += tl.where(keep, part_of_low * c[i], 0.0)
                else:
                    low += part_of_low
            if NEED_DA:
                # da += (keep ⊙ x)ᵀ g
                g_tile = load_tile(g + i * rows, RANK, 1, m, r, end, RANK, BLOCK_M, BLOCK_R)
                kept = x_tile
                if DROPOUT:
                    kept = tl.where(keep, x_tile, 0.0)
                kept, g_tile = rounded(kept.T.to(g_tile.dtype), PRECISION), rounded(g_tile, PRECISION)
                new = new + (tl.dot(kept, g_tile, das[i], input_precision=PRECISION),)
        if NEED_DA:
            das = new
        if NEED_DX:
            store_tile(dx, K, 1, low, m, k, end, K, BLOCK_M, BLOCK_C)
    if NEED_DA:
        for i in tl.static_range(LAYERS):
            at = part + (i * splits + split).to(tl.int64) * K * RANK
            store_tile(at, RANK, 1, das[i], k, r, K, RANK, BLOCK_C, BLOCK_R)


@triton.jit
def add_parts(
    part, out, stride_oc, stride_or, first, parts, C, R, factor, ends,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out [C, R] = factor · Σ part, for each of several sums.

    Grid: one program to each tile [BLOCK_C, BLOCK_R], sum after sum; the programs of sum i end at number `ends`. Its
    `parts` parts begin at row `first`. first, parts, C and ends are codes (`number`).
    """
    program = tl.program_id(0)
    for i in tl.static_range(len(out)):
        begin = 0 if i == 0 else number(ends[i - 1])
        if (program >= begin) & (program < number(ends[i])):
            r, j = (program - begin) % CHUNKS * BLOCK_R, (program - begin) // CHUNKS * BLOCK_C
            rows, count = number(C[i]), number(parts[i])
            total = sum_of_parts(part, number(first[i]), count, rows, j, r, BLOCK_C, BLOCK_R, CHUNKS * BLOCK_R)
            store_tile(out[i], stride_oc[i], stride_or[i], total * factor[i], j, r, rows, R[i], BLOCK_C, BLOCK_R)
