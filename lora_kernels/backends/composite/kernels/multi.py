"""The low-rank half of many adapters over the rows of one x. Not yet run on a GPU.

    forward     h_i = c_i · (keep ⊙ X_i) a_iᵀ        Y_i += s_i · h_i b_iᵀ
    backward    g_i = s_i · dY_i b_i                 dX_i += c_i · keep ⊙ (g_i a_i)
                da_i = c_i · g_iᵀ (keep ⊙ X_i)       db_i = s_i · dY_iᵀ h_i

X_i are the rows of adapter i. With SEGMENTS, for the experts of a layer, these follow each other in the order of the
adapters, and one mask is drawn over all rows. A program computes a tile of one adapter, which it finds from `starts`. A
launch has as many programs as any split of the rows among the adapters could need, and those that find nothing end at
once. The numbers that a program adds up, and their order, depend on its own adapter alone.

Arrays of parts are in fp32 with rows of `rank` numbers: the largest rank, rounded up. A program touches as many of them
as its own adapter needs. z is x or dy, and u is h or g.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: SIM102 (SAVE is a constant of the compiler, `save` is not)

import triton
import triton.language as tl

from lora_kernels.backends.composite.kernels.adapters import (
    DA,
    NARROW,
    RANK,
    RESCALE,
    SCALE,
    WIDE,
    A,
    factor_of,
    field,
    find,
    first_of,
    keep_of,
    kept,
    load_rows,
    own_rows,
    real,
    tiles_of,
)
from lora_kernels.backends.composite.kernels.forward import rounded
from lora_kernels.backends.triton.kernels.blocks import load_tile, store_tile


@triton.jit
def _down(
    z, own, v, keep, part, stride_zm, stride_zc, r, first, last, rank,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write Σ over the columns `first` to `last` for one tile, whose first row is at `part`."""
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for c in range(first, last, BLOCK_C):
        z_tile = load_rows(z, own, stride_zm, stride_zc, c, last, BLOCK_C)
        v_tile = load_tile(v.at, v.stride_c, v.stride_r, c, r, last, own.rank, BLOCK_C, BLOCK_R)
        z_tile = kept(z_tile, keep, own.place, c, BLOCK_M, BLOCK_C, DROPOUT)
        # z is converted to the adapters' dtype, not they to its
        z_tile, v_tile = rounded(z_tile.to(v_tile.dtype), PRECISION), rounded(v_tile, PRECISION)
        acc = tl.dot(z_tile, v_tile, acc, input_precision=PRECISION)
    store_tile(part, rank, 1, acc, 0, r, own.count, rank, BLOCK_M, BLOCK_R)


@triton.jit(do_not_specialize=["M", "n", "chunks"])
def down_multi(
    z, order, starts, table, part, stride_zm, stride_zc, M, COLUMNS, n, rank, chunks, steps, splits,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ADAPTERS: tl.constexpr, WHICH: tl.constexpr, UNIT: tl.constexpr,
    ALIGNED: tl.constexpr, TYPE: tl.constexpr, DROPOUT: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """part = (keep ⊙ X_i) a_iᵀ, or dY_i b_i, split over the columns into `splits` parts of `steps` steps.

    Grid: one program to each tile of rows, part and chunk of the rank. The row at position m of `order` is row m of
    each part.

    Reads z [M, COLUMNS], a or b as WHICH says, and the seeds with DROPOUT; writes part [splits, M, rank].
    """
    chunk, rest = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    split, tile = rest % splits, rest // splits
    i, place = find(tile, starts, n, BLOCK_M, ADAPTERS)
    if i < n:
        own = own_rows(order, starts, table, i, place, BLOCK_M)
        if chunk * WIDE < own.rank:
            v, keep = factor_of(table, i, WHICH, UNIT, ALIGNED, TYPE), keep_of(table, i, starts, DROPOUT, SEGMENTS)
            first = split * steps * BLOCK_C
            last = min(COLUMNS, first + steps * BLOCK_C)
            at = part + (split.to(tl.int64) * M + own.position) * rank
            if own.rank <= NARROW:
                _down(
                    z, own, v, keep, at, stride_zm, stride_zc, 0, first, last, rank,
                    BLOCK_M, BLOCK_C, NARROW, DROPOUT, PRECISION,
                )  # fmt: skip
            else:
                _down(
                    z, own, v, keep, at, stride_zm, stride_zc, chunk * WIDE, first, last, rank,
                    BLOCK_M, BLOCK_C, WIDE, DROPOUT, PRECISION,
                )  # fmt: skip


@triton.jit
def _low(
    part, own, r, rank, stride_split, splits, factor, h, save,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, TYPE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Return factor · Σ part for one tile and chunk of the rank, in the adapters' dtype. With SAVE write it to h where
    `save` is true. The parts are added in their order."""
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for _ in range(splits):
        total += load_tile(part, rank, 1, 0, r, own.count, own.rank, BLOCK_M, BLOCK_R)
        part += stride_split
    tile = (total * factor).to(TYPE)
    if SAVE:
        if save:
            store_tile(h, own.rank, 1, tile, 0, r, own.count, own.rank, BLOCK_M, BLOCK_R)
    return tile


@triton.jit
def _add(out, own, acc, factor, keep, c, COLUMNS, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr):
    """out[own rows, c : c + BLOCK_C] += factor · [keep ⊙] acc."""
    acc = kept(acc, keep, own.place, c, BLOCK_M, BLOCK_C, DROPOUT)
    col = c + tl.arange(0, BLOCK_C)
    at = out + own.rows.to(tl.int64)[:, None] * COLUMNS + col[None, :]
    inside = own.mine[:, None] & (col < COLUMNS)[None, :]
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32) + acc * factor
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _up(
    part, h, save, out, own, v, keep, first, last, factor_h, factor, rank, stride_split, splits, COLUMNS,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, ONE: tl.constexpr, DROPOUT: tl.constexpr,
    TYPE: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add factor · [keep ⊙] (h_i v) to one tile of rows of `out`, from column `first` to `last`. With ONE the rank
    takes one block, and h_i is summed once."""
    if ONE:
        h_tile = _low(part, own, 0, rank, stride_split, splits, factor_h, h, save, BLOCK_M, BLOCK_R, TYPE, SAVE)
    elif first >= last:  # h alone is wanted
        for r in range(0, own.rank, BLOCK_R):
            _low(part, own, r, rank, stride_split, splits, factor_h, h, save, BLOCK_M, BLOCK_R, TYPE, SAVE)
    for c in range(first, last, BLOCK_C):
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        if ONE:
            v_tile = load_tile(v.at, v.stride_r, v.stride_c, 0, c, own.rank, last, BLOCK_R, BLOCK_C)
            acc = tl.dot(rounded(h_tile, PRECISION), rounded(v_tile, PRECISION), acc, input_precision=PRECISION)
        else:
            for r in range(0, own.rank, BLOCK_R):
                saves = save & (c == first)
                each = _low(part, own, r, rank, stride_split, splits, factor_h, h, saves, BLOCK_M, BLOCK_R, TYPE, SAVE)
                v_tile = load_tile(v.at, v.stride_r, v.stride_c, r, c, own.rank, last, BLOCK_R, BLOCK_C)
                acc = tl.dot(rounded(each, PRECISION), rounded(v_tile, PRECISION), acc, input_precision=PRECISION)
        _add(out, own, acc, factor, keep, c, COLUMNS, BLOCK_M, BLOCK_C, DROPOUT)


@triton.jit(do_not_specialize=["M", "n", "steps", "ranges"])
def up_multi(
    part, order, starts, table, h, out, M, COLUMNS, n, rank, splits, steps, ranges,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ADAPTERS: tl.constexpr, WHICH: tl.constexpr, UNIT: tl.constexpr,
    ALIGNED: tl.constexpr, TYPE: tl.constexpr, DROPOUT: tl.constexpr, SEGMENTS: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h_i = c_i · Σ part and Y_i += s_i · h_i b_iᵀ, or with WHICH = A g_i = s_i · Σ part and
    dX_i += c_i · keep ⊙ (g_i a_i).

    Grid: one program to each tile of rows and range of `steps` blocks of columns. With no steps nothing but h or g is
    written.

    Reads part, a or b, and the seeds with DROPOUT; adds to `out` [M, COLUMNS], contiguous; writes h with SAVE.
    """
    tile, number = tl.program_id(0) // ranges, tl.program_id(0) % ranges
    i, place = find(tile, starts, n, BLOCK_M, ADAPTERS)
    if i < n:
        own = own_rows(order, starts, table, i, place, BLOCK_M)
        if own.rank > 0:
            v, keep = factor_of(table, i, WHICH, UNIT, ALIGNED, TYPE), keep_of(table, i, starts, DROPOUT, SEGMENTS)
            if WHICH == A:
                factor_h, factor = real(table, i, SCALE), real(table, i, RESCALE)
            else:
                factor_h, factor = real(table, i, RESCALE), real(table, i, SCALE)
            if SAVE:
                h += first_of(table, starts, i, n, ADAPTERS) + place.to(tl.int64) * own.rank
            first = number * steps * BLOCK_C
            last = min(COLUMNS, first + steps * BLOCK_C)
            part += own.position.to(tl.int64) * rank
            stride_split = tl.cast(M, tl.int64) * rank
            save = number == 0
            if own.rank <= NARROW:
                _up(
                    part, h, save, out, own, v, keep, first, last, factor_h, factor, rank, stride_split, splits,
                    COLUMNS, BLOCK_M, BLOCK_C, NARROW, True, DROPOUT, TYPE, SAVE, PRECISION,
                )  # fmt: skip
            elif own.rank <= WIDE:
                _up(
                    part, h, save, out, own, v, keep, first, last, factor_h, factor, rank, stride_split, splits,
                    COLUMNS, BLOCK_M, BLOCK_C, WIDE, True, DROPOUT, TYPE, SAVE, PRECISION,
                )  # fmt: skip
            else:
                _up(
                    part, h, save, out, own, v, keep, first, last, factor_h, factor, rank, stride_split, splits,
                    COLUMNS, BLOCK_M, BLOCK_C, WIDE, False, DROPOUT, TYPE, SAVE, PRECISION,
                )  # fmt: skip


@triton.jit
def _across(
    z, order, starts, table, i, u, keep, part, stride_zm, stride_zc, place, end, c, r, rank, COLUMNS,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write (keep ⊙ Z_i)ᵀ u_i over the rows `place` to `end` of adapter i, for one tile."""
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for m in range(place, end, BLOCK_M):
        own = own_rows(order, starts, table, i, m, BLOCK_M)
        z_tile = load_rows(z, own, stride_zm, stride_zc, c, COLUMNS, BLOCK_C)
        u_tile = load_tile(u, own.rank, 1, m, r, end, own.rank, BLOCK_M, BLOCK_R)
        z_tile = kept(z_tile, keep, m, c, BLOCK_M, BLOCK_C, DROPOUT)
        z_tile, u_tile = rounded(z_tile.T.to(u_tile.dtype), PRECISION), rounded(u_tile, PRECISION)
        acc = tl.dot(z_tile, u_tile, acc, input_precision=PRECISION)
    store_tile(part, rank, 1, acc, c, r, COLUMNS, rank, BLOCK_C, BLOCK_R)


@triton.jit(do_not_specialize=["n", "chunks"])
def across_multi(
    z, order, starts, table, u, part, stride_zm, stride_zc, COLUMNS, n, rank, chunks,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PART: tl.constexpr, ADAPTERS: tl.constexpr, OUT: tl.constexpr,
    DROPOUT: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of (keep ⊙ X_i)ᵀ g_i with OUT = DA, or of dY_iᵀ h_i with OUT = DB, each over PART rows of one adapter.

    Grid: one program to each part, block of columns and chunk of the rank.

    Reads z [M, COLUMNS], u, and the seeds with DROPOUT; writes part [parts, COLUMNS, rank].
    """
    chunk, rest = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    cols = tl.cdiv(COLUMNS, BLOCK_C)
    c, tile = rest % cols * BLOCK_C, rest // cols
    i, place = find(tile, starts, n, PART, ADAPTERS)
    if i < n:
        rank_i = field(table, i, RANK).to(tl.int32)
        if (chunk * WIDE < rank_i) & (field(table, i, OUT) != 0):
            end = min(tl.load(starts + i + 1) - tl.load(starts + i), place + PART)
            keep = keep_of(table, i, starts, DROPOUT, SEGMENTS)
            u += first_of(table, starts, i, n, ADAPTERS)
            part += tile.to(tl.int64) * COLUMNS * rank
            if rank_i <= NARROW:
                _across(
                    z, order, starts, table, i, u, keep, part, stride_zm, stride_zc, place, end, c, 0, rank, COLUMNS,
                    BLOCK_M, BLOCK_C, NARROW, DROPOUT, PRECISION,
                )  # fmt: skip
            else:
                _across(
                    z, order, starts, table, i, u, keep, part, stride_zm, stride_zc, place, end, c, chunk * WIDE, rank,
                    COLUMNS, BLOCK_M, BLOCK_C, WIDE, DROPOUT, PRECISION,
                )  # fmt: skip


@triton.jit(do_not_specialize=["n", "chunks"])
def add_parts_multi(
    starts, table, part, COLUMNS, n, rank, chunks,
    BLOCK_C: tl.constexpr, PART: tl.constexpr, ADAPTERS: tl.constexpr, OUT: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """da_i = c_i · Σ part, or db_i = s_i · Σ part, in the order of the parts; zeros for an adapter without rows.

    Grid: one program to each adapter, block of columns and chunk of the rank.

    Reads part; writes da_i [R, K] with OUT = DA, or db_i [N, R] with OUT = DB, contiguous, at their addresses.
    """
    chunk, rest = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    cols = tl.cdiv(COLUMNS, BLOCK_C)
    c, i, r = rest % cols * BLOCK_C, rest // cols, chunk * WIDE
    out, rank_i = field(table, i, OUT), field(table, i, RANK).to(tl.int32)
    if (r < rank_i) & (out != 0):
        parts, each = tiles_of(starts, n, PART, ADAPTERS), tl.arange(0, ADAPTERS)
        at = part + tl.sum(tl.where(each < i, parts, 0), 0).to(tl.int64) * COLUMNS * rank
        total = tl.zeros((BLOCK_C, WIDE), tl.float32)
        for _ in range(tl.sum(tl.where(each == i, parts, 0), 0)):
            total += load_tile(at, rank, 1, c, r, COLUMNS, rank_i, BLOCK_C, WIDE)
            at += tl.cast(COLUMNS, tl.int64) * rank
        to = out.to(tl.pointer_type(TYPE))
        if OUT == DA:
            store_tile(to, 1, COLUMNS, total * real(table, i, RESCALE), c, r, COLUMNS, rank_i, BLOCK_C, WIDE)
        else:
            store_tile(to, rank_i, 1, total * real(table, i, SCALE), c, r, COLUMNS, rank_i, BLOCK_C, WIDE)
