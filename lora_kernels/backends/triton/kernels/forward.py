"""The forward in one launch, by one of two kernels. Both accumulate in fp32 and round once, at the store. Neither has
yet run on a GPU.

    h = c · (keep ⊙ x) aᵀ [M,R]        y = x wᵀ + s · h bᵀ + bias [M,N]

w is dense, or `quant.Codes` in the redundant kernel. Codes are dequantised tile by tile as the K loop comes to them:
every row block of x reads all codes once.

`s · h bᵀ` goes into the accumulators of `x wᵀ` with h in the adapters' dtype, as it is saved: (acc / s + h bᵀ) · s, so
that no operand of the tensor cores is rounded twice. `inverse` is 1/s, and `R_up` is R, or 0 where s is 0. Where the
adapters are fp32 beside an x in 16 bits, the products with a and b are made in fp32, in the precision PRECISION.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from lora_kernels.backends.triton.kernels.blocks import load_tile, store_part, store_tile, sum_parts, swizzle
from lora_kernels.backends.triton.kernels.product import Blocks, Mask, Operand, keep_x, load_q, product
from lora_kernels.backends.triton.kernels.quant import load_levels
from lora_kernels.backends.triton.kernels.sync import arrive, claim, leave, publish, wait


@triton.jit
def store_y(
    y, acc, bias, stride_bias, m, n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Write y = acc + bias for the tile at (m, n)."""
    if HAS_BIAS:
        col = n + tl.arange(0, BLOCK_N)
        acc += tl.load(bias + col * stride_bias, mask=col < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y, N, 1, acc, m, n, M, N, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "T"])
def forward_tickets(
    x, w, a, b, bias, y, h, seed, sync,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_bias,
    M, N, K, R, R_up, scale, inverse, c, T,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = c · (keep ⊙ x) aᵀ [M, R], then y = x wᵀ + s · h bᵀ + bias [M, N].

    Grid: any number of programs, which claim work items by tickets. First come the tiles of h, which publish a flag for
    their row block; then the tiles of y, which run their K loop before they wait for that flag. Only the tiles of h pay
    for dropout.

    Reads x, w, a, b, bias and seed; writes y and h. Leaves sync zero. W says how x and w are read (`Operand.READ`): ""
    or "tma".
    """
    rows, chunks = tl.cdiv(M, BLOCK_M), tl.cdiv(R, BLOCK_R)
    cols = tl.cdiv(N, BLOCK_N)
    n_h = rows * chunks
    items = n_h + rows * cols
    flags = sync + 1
    key = 0
    if DROPOUT:
        key = tl.load(seed)
    ticket = claim(sync)
    while ticket < items:
        if ticket < n_h:
            m, r = ticket // chunks * BLOCK_M, ticket % chunks * BLOCK_R
            # h = c · (keep ⊙ x) aᵀ
            h_tile = product(
                tl.zeros((BLOCK_M, BLOCK_R), tl.float32),
                Operand(x, stride_xm, stride_xk, M, READ=W),
                Operand(a, stride_ar, stride_ak, R),
                m, r, 0, K, Mask(key, T, "x" if DROPOUT else ""), Blocks(BLOCK_M, BLOCK_R, BLOCK_K), PRECISION,
            )  # fmt: skip
            store_tile(h, R, 1, h_tile * c, m, r, M, R, BLOCK_M, BLOCK_R)
            publish(flags + ticket // chunks)
        else:
            pm, pn = swizzle(ticket - n_h, rows, cols, GROUP_M)
            m, n = pm * BLOCK_M, pn * BLOCK_N
            # y = x wᵀ + s · h bᵀ + bias
            acc = product(
                tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
                Operand(x, stride_xm, stride_xk, M, READ=W),
                Operand(w, stride_wn, stride_wk, N, READ=W),
                m, n, 0, K, Mask(key, T), Blocks(BLOCK_M, BLOCK_N, BLOCK_K), PRECISION,
            )  # fmt: skip
            wait(flags + pm, chunks)
            acc = product(
                acc * inverse,
                Operand(h, R, 1, M, CACHE=".cg"),
                Operand(b, stride_bn, stride_br, N),
                m, n, 0, R_up, Mask(key, T), Blocks(BLOCK_M, BLOCK_N, BLOCK_R), PRECISION, STAGES=1,
            )  # fmt: skip
            store_y(y, acc * scale, bias, stride_bias, m, n, M, N, BLOCK_M, BLOCK_N, HAS_BIAS)
        ticket = claim(sync)
    leave(sync, ticket, items, 1 + rows)


@triton.jit
def add_parts(
    acc, h_tile, part, sync, tile, split, parts,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write one of `parts` parts of both sums of a redundant tile, and return (acc, h_tile, last).

    The last program to arrive adds the parts up in their order, leaves sync[tile] zero, and gets the whole sums and
    True.
    """
    SLOT: tl.constexpr = BLOCK_M * (BLOCK_N + BLOCK_R)
    first = part + tile.to(tl.int64) * parts * SLOT
    store_part(first + split * SLOT, acc, BLOCK_M, BLOCK_N)
    store_part(first + split * SLOT + BLOCK_M * BLOCK_N, h_tile, BLOCK_M, BLOCK_R)
    last = arrive(sync + tile, parts)
    if last:
        tl.store(sync + tile, 0)
        acc = sum_parts(first, SLOT, parts, BLOCK_M, BLOCK_N)
        h_tile = sum_parts(first + BLOCK_M * BLOCK_N, SLOT, parts, BLOCK_M, BLOCK_R)
    return acc, h_tile, last


@triton.jit
def store_redundant(
    acc, h_tile, b, bias, y, h, stride_bn, stride_br, stride_bias, m, n, M, N, R, R_up, scale, inverse, c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write y, and h in the first column of tiles, from acc = x wᵀ and h_tile = (keep ⊙ x) aᵀ of a redundant tile."""
    h_tile *= c
    if SAVE_H and n == 0:
        store_tile(h, R, 1, h_tile, m, 0, M, R, BLOCK_M, BLOCK_R)
    # y = x wᵀ + s · h bᵀ + bias
    b_tile = load_tile(b, stride_br, stride_bn, 0, n, R_up, N, BLOCK_R, BLOCK_N)
    acc = tl.dot(h_tile.to(b_tile.dtype), b_tile, acc * inverse, input_precision=PRECISION)
    store_y(y, acc * scale, bias, stride_bias, m, n, M, N, BLOCK_M, BLOCK_N, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "T", "steps"])
def forward_redundant(
    x, w, a, b, bias, y, h, seed, sync, part,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_bias,
    M, N, K, R, R_up, steps, scale, inverse, c, T,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SAVE_H: tl.constexpr, SPLIT: tl.constexpr, W: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x wᵀ + s · h bᵀ + bias [M, N] with h = c · (keep ⊙ x) aᵀ [M, R].

    Grid: one program to each tile of y; with SPLIT several, each with `steps` steps of K. Every program accumulates its
    rows of h in its K loop, so none waits for another. BLOCK_R >= R. With SPLIT each program stores its part of both
    sums, and the last to arrive adds them up in their order.

    Reads x, w, a, b, bias and seed; writes y, and h with SAVE_H; part is scratch. Leaves sync zero. W says how w is
    read (`Operand.READ`): "" or "codes".
    """
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
    if W == "codes":
        level = load_levels(w)
    start = split * steps * BLOCK_K
    end = min(K, start + steps * BLOCK_K)
    end_w = K if W == "codes" else end  # blocks of codes are counted by whole rows
    for k in range(start, end, BLOCK_K):
        x_tile = load_tile(x, stride_xm, stride_xk, m, k, M, end, BLOCK_M, BLOCK_K)
        w_tile = load_q(Operand(w, stride_wn, stride_wk, N, READ=W), level, n, k, end_w, BLOCK_N, BLOCK_K)
        w_tile = w_tile.to(x_tile.dtype)
        a_tile = load_tile(a, stride_ak, stride_ar, k, 0, end, R, BLOCK_K, BLOCK_R)
        # acc = x wᵀ, h = (keep ⊙ x) aᵀ
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        if DROPOUT:
            x_tile = keep_x(x_tile, key, m, k, T, BLOCK_M, BLOCK_K)
        h_tile = tl.dot(x_tile.to(a_tile.dtype), a_tile, h_tile, input_precision=PRECISION)
    last = True
    if SPLIT:
        parts = tl.cdiv(K, steps * BLOCK_K)
        acc, h_tile, last = add_parts(acc, h_tile, part, sync, tile, split, parts, BLOCK_M, BLOCK_N, BLOCK_R)
    if last:
        store_redundant(
            acc, h_tile, b, bias, y, h, stride_bn, stride_br, stride_bias, m, n, M, N, R, R_up, scale, inverse, c,
            BLOCK_M, BLOCK_N, BLOCK_R, HAS_BIAS, SAVE_H, PRECISION,
        )  # fmt: skip
