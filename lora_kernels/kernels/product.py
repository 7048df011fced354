"""Tiles and their products: what the kernels are made of."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: B008 (Triton 3.6 takes no bare value as the default of a constexpr)

import triton
import triton.language as tl

from lora_kernels.kernels.philox import keep_tile


@triton.jit
def swizzle(tile, rows, cols, GROUP: tl.constexpr):
    """The (row, column) of a tile in a grid of rows x cols tiles, GROUP rows at a time, so that neighbours share
    operands in L2."""
    band = GROUP * cols
    first = tile // band * GROUP
    height = min(rows - first, GROUP)
    return first + tile % band % height, tile % band // height


@triton.jit
def load_tile(
    p,
    stride_pi,
    stride_pj,
    i,
    j,
    n_i,
    n_j,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    CACHE: tl.constexpr = tl.constexpr(""),
):
    """p[i : i + BLOCK_I, j : j + BLOCK_J], zero outside p [n_i,n_j]."""
    row = i + tl.arange(0, BLOCK_I)
    col = j + tl.arange(0, BLOCK_J)
    at = p + row.to(tl.int64)[:, None] * stride_pi + col.to(tl.int64)[None, :] * stride_pj
    return tl.load(at, mask=(row < n_i)[:, None] & (col < n_j)[None, :], other=0.0, cache_modifier=CACHE)


@triton.jit
def store_tile(p, stride_pi, stride_pj, tile, i, j, n_i, n_j, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """p[i : i + BLOCK_I, j : j + BLOCK_J] = tile, rounded to p's dtype."""
    row = i + tl.arange(0, BLOCK_I)
    col = j + tl.arange(0, BLOCK_J)
    at = p + row.to(tl.int64)[:, None] * stride_pi + col.to(tl.int64)[None, :] * stride_pj
    tl.store(at, tile.to(p.dtype.element_ty), mask=(row < n_i)[:, None] & (col < n_j)[None, :])


@triton.jit
def store_part(part, tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One part of a sum, whole and dense, edges included."""
    tl.store(part + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :], tile)


@triton.jit
def sum_parts(part, stride_part, parts, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The parts of a sum, added in their order: the same bits whoever adds them."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    at = part + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    for _ in range(parts):
        total += tl.load(at, cache_modifier=".cg")
        at += stride_part
    return total


@triton.jit
def keep_x(x_tile, seed, m, k, T, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep ⊙ x for a tile of x. Exact: the factor c goes on the accumulators."""
    return tl.where(keep_tile(seed, m, k, T, BLOCK_M, BLOCK_K), x_tile, 0.0)


@triton.jit
def product(
    acc,
    p,
    stride_pi,
    stride_pt,
    q,
    stride_qj,
    stride_qt,
    i,
    j,
    start,
    end,
    n_i,
    n_j,
    seed,
    T,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    KEEP: tl.constexpr = tl.constexpr(""),
    P_TMA: tl.constexpr = tl.constexpr(False),
    Q_TMA: tl.constexpr = tl.constexpr(""),
    P_CACHE: tl.constexpr = tl.constexpr(""),
    Q_CACHE: tl.constexpr = tl.constexpr(""),
    STAGES: tl.constexpr = tl.constexpr(None),
):
    """acc[i, j] += Σ_t p[i, t] q[j, t], t in [start, end), for the tile at (i, j) of an n_i x n_j result.

    Every product of the two passes is this one, with strides that say which way round its operands lie. q is converted
    to p's dtype.

    KEEP    "" p as it is, "x" p is x under dropout, "xT" p is xᵀ under dropout
    P_TMA   p is a descriptor with blocks [BLOCK_I, BLOCK_T]
    Q_TMA   "" q is a pointer, "jt" a descriptor with blocks [BLOCK_J, BLOCK_T], "tj" with blocks [BLOCK_T, BLOCK_J]
    STAGES  1 keeps the loop from being pipelined
    """
    for t in tl.range(start, end, BLOCK_T, num_stages=STAGES):
        if P_TMA:
            p_tile = p.load([i, t])
        else:
            p_tile = load_tile(p, stride_pi, stride_pt, i, t, n_i, end, BLOCK_I, BLOCK_T, P_CACHE)
        if Q_TMA == "jt":
            q_tile = q.load([j, t]).T
        elif Q_TMA == "tj":
            q_tile = q.load([t, j])
        else:
            q_tile = load_tile(q, stride_qt, stride_qj, t, j, end, n_j, BLOCK_T, BLOCK_J, Q_CACHE)
        if KEEP == "x":
            p_tile = keep_x(p_tile, seed, i, t, T, BLOCK_I, BLOCK_T)
        elif KEEP == "xT":
            p_tile = tl.where(keep_tile(seed, t, i, T, BLOCK_T, BLOCK_I).T, p_tile, 0.0)
        acc = tl.dot(p_tile, q_tile.to(p_tile.dtype), acc, input_precision=PRECISION)
    return acc
