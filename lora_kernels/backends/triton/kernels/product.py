"""The product of two tiles over a range, which every kernel is made of."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: B008 (Triton 3.6 takes no bare value as the default of a constexpr)

import triton
import triton.language as tl

from lora_kernels.backends.triton.kernels.blocks import load_tile
from lora_kernels.backends.triton.kernels.philox import keep_tile
from lora_kernels.backends.triton.kernels.quant import load_levels, weight_tile


@triton.jit
def keep_x(x_tile, seed, m, k, T, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep ⊙ x for a tile of x. Exact: the factor c goes on the accumulators."""
    return tl.where(keep_tile(seed, m, k, T, BLOCK_M, BLOCK_K), x_tile, 0.0)


@triton.jit
def load_q(
    q,
    level,
    stride_qj,
    stride_qt,
    j,
    t,
    n_j,
    n_t,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    Q: tl.constexpr,
    LIES: tl.constexpr,
    CACHE: tl.constexpr = tl.constexpr(""),
):
    """q[j : j + BLOCK_J, t : t + BLOCK_T]ᵀ, zero outside q [n_j,n_t]. Q and LIES as in `product`; `level` is what
    `load_levels` gives for codes."""
    if Q == "tma":
        if LIES == "jt":
            tile = q.load([j, t]).T
        else:
            tile = q.load([t, j])
    elif Q == "codes":
        if LIES == "jt":
            tile = weight_tile(q, level, stride_qj, j, t, n_j, n_t, BLOCK_J, BLOCK_T).T
        else:
            tile = weight_tile(q, level, stride_qt, t, j, n_t, n_j, BLOCK_T, BLOCK_J)
    else:
        tile = load_tile(q, stride_qt, stride_qj, t, j, n_t, n_j, BLOCK_T, BLOCK_J, CACHE)
    return tile


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
    Q: tl.constexpr = tl.constexpr(""),
    LIES: tl.constexpr = tl.constexpr(""),
    P_CACHE: tl.constexpr = tl.constexpr(""),
    Q_CACHE: tl.constexpr = tl.constexpr(""),
    STAGES: tl.constexpr = tl.constexpr(None),
):
    """acc[i, j] += Σ_t p[i, t] q[j, t], t in [start, end), for the tile at (i, j) of an n_i x n_j result.

    Every product of the two passes is this one, with strides that say which way round its operands lie. q is converted
    to p's dtype.

    KEEP    "" p as it is, "x" p is x under dropout, "xT" p is xᵀ under dropout
    P_TMA   p is a descriptor with blocks [BLOCK_I, BLOCK_T]
    Q       "" q is a pointer, "tma" a descriptor, "codes" a `quant.Codes`, of which [0, end) is the whole extent of t
    LIES    of those two: "jt" their rows are j, and a descriptor has blocks [BLOCK_J, BLOCK_T]; "tj" they are t
    STAGES  1 keeps the loop from being pipelined
    """
    level = 0
    if Q == "codes":
        level = load_levels(q)
    for t in tl.range(start, end, BLOCK_T, num_stages=STAGES):
        if P_TMA:
            p_tile = p.load([i, t])
        else:
            p_tile = load_tile(p, stride_pi, stride_pt, i, t, n_i, end, BLOCK_I, BLOCK_T, P_CACHE)
        q_tile = load_q(q, level, stride_qj, stride_qt, j, t, n_j, end, BLOCK_J, BLOCK_T, Q, LIES, Q_CACHE)
        if KEEP == "x":
            p_tile = keep_x(p_tile, seed, i, t, T, BLOCK_I, BLOCK_T)
        elif KEEP == "xT":
            p_tile = tl.where(keep_tile(seed, t, i, T, BLOCK_T, BLOCK_I).T, p_tile, 0.0)
        acc = tl.dot(p_tile, q_tile.to(p_tile.dtype), acc, input_precision=PRECISION)
    return acc
