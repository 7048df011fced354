"""The backward in one launch. It accumulates in fp32 and rounds once, at the store. It has not yet run on a GPU.

g = s · dy b [M,R]    dx = dy w + c · keep ⊙ (g a) [M,K]    da = c · gᵀ (keep ⊙ x) [R,K]    db = s · dyᵀ h [N,R]

w is dense or `quant.Codes`. Codes are dequantised tile by tile as the loop of dx comes to them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from lora_kernels.backends.triton.kernels.blocks import store_part, store_tile, sum_parts, swizzle
from lora_kernels.backends.triton.kernels.philox import keep_tile
from lora_kernels.backends.triton.kernels.product import Blocks, Mask, Operand, product
from lora_kernels.backends.triton.kernels.sync import arrive, claim, leave, publish, wait


@triton.jit
def sum_over_rows(
    p, stride_pm, stride_pc, q, stride_qm, stride_qr, out, stride_oc, stride_or, factor,
    part, counts, flags, published, item, splits, blocks, M, C, R, key, T,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Compute one of `splits` parts of a tile of out[c, r] = factor · Σ_m p[m, c] q[m, r].

    The last program to arrive adds the parts up in their order and writes the tile. MASKED: p is x, under dropout.
    WAIT: q is published in row blocks of BLOCK_M, each complete after `published` publications.
    """
    tile, split = item // splits, item % splits
    chunks = tl.cdiv(R, BLOCK_R)
    i, r = tile // chunks * BLOCK_C, tile % chunks * BLOCK_R
    start = split * blocks * BLOCK_M
    end = min(M, start + blocks * BLOCK_M)
    if WAIT:
        for block in range(split * blocks, tl.cdiv(end, BLOCK_M)):
            wait(flags + block, published)
    acc = product(
        tl.zeros((BLOCK_C, BLOCK_R), tl.float32),
        Operand(p, stride_pc, stride_pm, C),
        Operand(q, stride_qr, stride_qm, R, CACHE=".cg" if WAIT else ""),
        i, r, start, end, Mask(key, T, "xT" if MASKED else ""), Blocks(BLOCK_C, BLOCK_R, BLOCK_T), PRECISION,
    )  # fmt: skip
    SLOT: tl.constexpr = BLOCK_C * BLOCK_R
    first = part + tile.to(tl.int64) * splits * SLOT
    store_part(first + split * SLOT, acc, BLOCK_C, BLOCK_R)
    if arrive(counts + tile, splits):
        acc = sum_parts(first, SLOT, splits, BLOCK_C, BLOCK_R)
        store_tile(out, stride_oc, stride_or, acc * factor, i, r, C, R, BLOCK_C, BLOCK_R)


@triton.jit(do_not_specialize=["M", "T", "splits", "blocks", "need_dx", "need_da", "need_db"])
def backward(
    dy, dy_rows, x, w, a, b, h, g, dx, da, db, seed, sync, part,
    stride_dym, stride_dyn, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_ar, stride_ak, stride_bn, stride_br, stride_hm, stride_hr,
    M, N, K, R, scale, c, T, splits, blocks, need_dx, need_da, need_db,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr, GROUP_M: tl.constexpr, DROPOUT: tl.constexpr, W: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """g = s · dy b, dx = dy w + c · keep ⊙ (g a), da = c · gᵀ (keep ⊙ x), db = s · dyᵀ h.

    Grid: any number of programs, which claim work items by tickets, in this order: tiles of g, which publish a flag for
    their row block; parts of db, which need dy and h only; tiles of dx [BLOCK_M, BLOCK_K]; parts of da, which need g.
    There are tiles of g where dx or da is needed. Parts of da and db are sums over `blocks` row blocks.

    Reads dy, x, w, a, b, h and seed; writes those of dx, da and db that are needed; g and part are scratch. Leaves sync
    zero. W says how w is read (`Operand.READ`). `dy_rows` is dy as a descriptor where w is one, else the pointer again.
    """
    rows, chunks, cols = tl.cdiv(M, BLOCK_M), tl.cdiv(R, BLOCK_R), tl.cdiv(K, BLOCK_K)
    tiles_db, tiles_da = need_db * tl.cdiv(N, BLOCK_C) * chunks, need_da * tl.cdiv(K, BLOCK_C) * chunks
    end_g = (need_dx | need_da) * rows * chunks
    end_db = end_g + tiles_db * splits
    end_dx = end_db + need_dx * rows * cols
    end_da = end_dx + tiles_da * splits
    flags = sync + 1
    counts = flags + rows
    key = 0
    if DROPOUT:
        key = tl.load(seed)
    ticket = claim(sync)
    while ticket < end_da:
        if ticket < end_g:
            m, r = ticket // chunks * BLOCK_M, ticket % chunks * BLOCK_R
            # g = s · dy b
            g_tile = product(
                tl.zeros((BLOCK_M, BLOCK_R), tl.float32),
                Operand(dy_rows, stride_dym, stride_dyn, M, READ="tma" if W == "tma" else ""),
                Operand(b, stride_br, stride_bn, R),
                m, r, 0, N, Mask(key, T), Blocks(BLOCK_M, BLOCK_R, BLOCK_N), PRECISION,
            )  # fmt: skip
            store_tile(g, R, 1, g_tile * scale, m, r, M, R, BLOCK_M, BLOCK_R)
            publish(flags + ticket // chunks)
        elif ticket < end_db:
            # db = s · dyᵀ h
            sum_over_rows(
                dy, stride_dym, stride_dyn, h, stride_hm, stride_hr, db, R, 1, scale,
                part, counts, flags, chunks, ticket - end_g, splits, blocks, M, N, R, key, T,
                BLOCK_M, BLOCK_C, BLOCK_T, BLOCK_R, PRECISION, MASKED=False, WAIT=False,
            )  # fmt: skip
        elif ticket < end_dx:
            pm, pk = swizzle(ticket - end_db, rows, cols, GROUP_M)
            m, k = pm * BLOCK_M, pk * BLOCK_K
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            if DROPOUT:
                # dx = c · keep ⊙ (g a), then + dy w: one set of accumulators, and no mask is alive in the main loop
                wait(flags + pm, chunks)
                acc = product(
                    acc,
                    Operand(g, R, 1, M, CACHE=".cg"),
                    Operand(a, stride_ak, stride_ar, K),
                    m, k, 0, R, Mask(key, T), Blocks(BLOCK_M, BLOCK_K, BLOCK_R), PRECISION, STAGES=1,
                )  # fmt: skip
                acc = tl.where(keep_tile(key, m, k, T, BLOCK_M, BLOCK_K), acc * c, 0.0)
            acc = product(
                acc,
                Operand(dy_rows, stride_dym, stride_dyn, M, READ="tma" if W == "tma" else ""),
                Operand(w, stride_wk, stride_wn, K, READ=W, LIES="tn"),
                m, k, 0, N, Mask(key, T), Blocks(BLOCK_M, BLOCK_K, BLOCK_N), PRECISION,
            )  # fmt: skip
            if not DROPOUT:
                # dx = dy w, then + g a
                wait(flags + pm, chunks)
                acc = product(
                    acc,
                    Operand(g, R, 1, M, CACHE=".cg"),
                    Operand(a, stride_ak, stride_ar, K),
                    m, k, 0, R, Mask(key, T), Blocks(BLOCK_M, BLOCK_K, BLOCK_R), PRECISION, STAGES=1,
                )  # fmt: skip
            store_tile(dx, K, 1, acc, m, k, M, K, BLOCK_M, BLOCK_K)
        else:
            # da = c · gᵀ (keep ⊙ x), tile by tile as its transpose
            sum_over_rows(
                x, stride_xm, stride_xk, g, R, 1, da, 1, K, c,
                part + tiles_db.to(tl.int64) * splits * BLOCK_C * BLOCK_R, counts + tiles_db, flags, chunks,
                ticket - end_dx, splits, blocks, M, K, R, key, T,
                BLOCK_M, BLOCK_C, BLOCK_T, BLOCK_R, PRECISION, MASKED=DROPOUT, WAIT=True,
            )  # fmt: skip
        ticket = claim(sync)
    leave(sync, ticket, end_da, 1 + rows + tiles_db + tiles_da)
