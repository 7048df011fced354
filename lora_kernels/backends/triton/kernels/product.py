"""The product of two matrices over a range, which every kernel is made of."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: B008 (Triton 3.6 takes no bare value as the default of a constexpr)

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_kernels.backends.triton.kernels.blocks import load_tile
from lora_kernels.backends.triton.kernels.philox import keep_tile
from lora_kernels.backends.triton.kernels.quant import load_levels, weight_tile

# Every product is Σ_t p[i, t] q[j, t]. The fields in capitals below are constants of the compiler.


class Operand(NamedTuple):
    """A matrix [n, t] that a product reads: p or q. The strides say which way round it lies in memory."""

    at: Any
    """A pointer, a descriptor or `quant.Codes`: see READ."""
    stride_n: Any
    """From one i of p, or one j of q, to the next."""
    stride_t: Any
    n: Any
    """The number of rows i of p, or j of q."""
    READ: Any = ""
    """How `at` is read. "": as a pointer. "tma": as a descriptor. "codes", for q only: as `quant.Codes`; t then runs
    over its whole extent."""
    LIES: Any = "nt"
    """What `at` has as rows, unless it is a pointer. "nt": rows n, and a descriptor has blocks [BLOCK_N, BLOCK_T].
    "tn", for q only: rows t, and a descriptor has blocks [BLOCK_T, BLOCK_N]. (BLOCK_N is I of p, J of q.)"""
    CACHE: Any = ""
    """The cache modifier of loads through a pointer. ".cg" reads what other programs have published."""


class Mask(NamedTuple):
    """The dropout mask on p."""

    seed: Any
    T: Any
    """The threshold, as in `core.dropout`."""
    KEEP: Any = ""
    """"": p is read as it is. "x": p is x under dropout. "xT": p is xᵀ under dropout."""


class Blocks(NamedTuple):
    """The block sizes of a product."""

    I: Any  # noqa: E741
    J: Any
    T: Any


@triton.jit
def keep_x(x_tile, seed, m, k, T, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return keep ⊙ x for a tile of x. This is exact: the factor c goes on the accumulators."""
    return tl.where(keep_tile(seed, m, k, T, BLOCK_M, BLOCK_K), x_tile, 0.0)


@triton.jit
def load_q(q, level, j, t, end, BLOCK_J: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return q[j : j + BLOCK_J, t : t + BLOCK_T]ᵀ, zero outside [0, q.n) x [0, end). `level` is the result of
    `load_levels` where q is codes."""
    if q.READ == "tma":
        if q.LIES == "nt":
            tile = q.at.load([j, t]).T
        else:
            tile = q.at.load([t, j])
    elif q.READ == "codes":
        if q.LIES == "nt":
            tile = weight_tile(q.at, level, q.stride_n, j, t, q.n, end, BLOCK_J, BLOCK_T).T
        else:
            tile = weight_tile(q.at, level, q.stride_t, t, j, end, q.n, BLOCK_T, BLOCK_J)
    else:
        tile = load_tile(q.at, q.stride_t, q.stride_n, t, j, end, q.n, BLOCK_T, BLOCK_J, q.CACHE)
    return tile


@triton.jit
def product(
    acc, p, q, i, j, start, end, mask, BLOCK, PRECISION: tl.constexpr, STAGES: tl.constexpr = tl.constexpr(None)
):
    """Return acc[i, j] + Σ_t p[i, t] q[j, t], t in [start, end), for the tile [BLOCK.I, BLOCK.J] at (i, j).

    Every product of the two passes is this one. p and q are `Operand`, mask is `Mask`, BLOCK is `Blocks`. p is
    converted to q's dtype where that is fp32 in memory, else q to p's. STAGES = 1 keeps the loop from being pipelined.
    """
    level = 0
    if q.READ == "codes":
        level = load_levels(q.at)
    for t in tl.range(start, end, BLOCK.T, num_stages=STAGES):
        if p.READ == "tma":
            p_tile = p.at.load([i, t])
        else:
            p_tile = load_tile(p.at, p.stride_n, p.stride_t, i, t, p.n, end, BLOCK.I, BLOCK.T, p.CACHE)
        q_tile = load_q(q, level, j, t, end, BLOCK.J, BLOCK.T)
        if mask.KEEP == "x":
            p_tile = keep_x(p_tile, mask.seed, i, t, mask.T, BLOCK.I, BLOCK.T)
        elif mask.KEEP == "xT":
            p_tile = tl.where(keep_tile(mask.seed, t, i, mask.T, BLOCK.T, BLOCK.I).T, p_tile, 0.0)
        if q.READ == "" and q_tile.dtype == tl.float32:
            p_tile = p_tile.to(tl.float32)
        acc = tl.dot(p_tile, q_tile.to(p_tile.dtype), acc, input_precision=PRECISION)
    return acc
