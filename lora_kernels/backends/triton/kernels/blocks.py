"""Tiles of a matrix: the order in which they are walked, and how they are loaded, stored and added up."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: B008 (Triton 3.6 takes no bare value as the default of a constexpr)

import triton
import triton.language as tl


@triton.jit
def swizzle(tile, rows, cols, GROUP: tl.constexpr):
    """Return the (row, column) of a tile in a grid of rows x cols tiles. Tiles are walked GROUP rows at a time, so that
    neighbours share operands in L2."""
    band = GROUP * cols
    first = tile // band * GROUP
    height = min(rows - first, GROUP)
    return first + tile % band % height, tile % band // height


@triton.jit
def load_tile(
    p, stride_pi, stride_pj, i, j, n_i, n_j,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, CACHE: tl.constexpr = tl.constexpr(""),
):  # fmt: skip
    """Return p[i : i + BLOCK_I, j : j + BLOCK_J], zero outside p [n_i, n_j]."""
    row = i + tl.arange(0, BLOCK_I)
    col = j + tl.arange(0, BLOCK_J)
    at = p + row.to(tl.int64)[:, None] * stride_pi + col.to(tl.int64)[None, :] * stride_pj
    return tl.load(at, mask=(row < n_i)[:, None] & (col < n_j)[None, :], other=0.0, cache_modifier=CACHE)


@triton.jit
def store_tile(p, stride_pi, stride_pj, tile, i, j, n_i, n_j, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Write p[i : i + BLOCK_I, j : j + BLOCK_J] = tile, rounded to p's dtype, inside p [n_i, n_j]."""
    row = i + tl.arange(0, BLOCK_I)
    col = j + tl.arange(0, BLOCK_J)
    at = p + row.to(tl.int64)[:, None] * stride_pi + col.to(tl.int64)[None, :] * stride_pj
    tl.store(at, tile.to(p.dtype.element_ty), mask=(row < n_i)[:, None] & (col < n_j)[None, :])


@triton.jit
def store_part(part, tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Write one part of a sum to `part`, dense and with its edges."""
    tl.store(part + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :], tile)


@triton.jit
def sum_parts(part, stride_part, parts, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the sum of the parts, added in their order: the bits are the same whichever program adds them."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    at = part + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    for _ in range(parts):
        total += tl.load(at, cache_modifier=".cg")
        at += stride_part
    return total
