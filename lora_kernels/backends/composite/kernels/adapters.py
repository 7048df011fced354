"""What belongs to one of many adapters, as a program reads it: its rows, its matrices, its mask. Not yet run on a GPU.

The numbers of adapter i are row i of `table`, which `fill` writes (`adapter_table`). Its rows of x are
``order[starts[i] : starts[i + 1]]``. So no number of a launch depends on which rows are whose.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_kernels.backends.triton.kernels.product import keep_x

FIELDS = tl.constexpr(13)
"""The numbers of one adapter in the table, int64. Their places follow."""
A = tl.constexpr(0)
B = tl.constexpr(1)
SEED = tl.constexpr(2)
DA = tl.constexpr(3)
DB = tl.constexpr(4)
"""These five are addresses. That of a gradient that is not wanted is 0."""
RANK = tl.constexpr(5)
"""0 for an adapter that has nothing in the layer."""
STRIDE_AR = tl.constexpr(6)
STRIDE_AK = tl.constexpr(7)
STRIDE_BN = tl.constexpr(8)
STRIDE_BR = tl.constexpr(9)
THRESHOLD = tl.constexpr(10)
"""T of `core.dropout`, 0 for an adapter without dropout."""
SCALE = tl.constexpr(11)
RESCALE = tl.constexpr(12)
"""These two are the bits of s and of c in fp32."""

NARROW = tl.constexpr(16)
WIDE = tl.constexpr(32)
"""The blocks of the rank: one of `NARROW` up to that rank, else blocks of `WIDE`. An adapter's own rank decides."""

SHIFT = tl.constexpr(1 << 60)
"""What the codes of `fill` begin at."""


class Own(NamedTuple):
    """A tile of rows of one adapter."""

    place: Any
    """The number of the first row among the adapter's rows."""
    position: Any
    """The place of that row in `order`."""
    count: Any
    """The number of the adapter's rows from that one on."""
    rank: Any
    """The adapter's rank."""
    rows: Any
    """The numbers of the rows in x."""
    mine: Any
    """Which of `rows` belong to the adapter. The last tile has others too."""


class Factor(NamedTuple):
    """a_i or b_i."""

    at: Any
    stride_c: Any
    """From one column of x or dy to the next."""
    stride_r: Any
    """From one r to the next."""


class Keep(NamedTuple):
    """The dropout mask of an adapter."""

    seed: Any
    T: Any
    first: Any
    """The row of the mask that belongs to the adapter's first row."""


@triton.jit
def fill(table, codes):
    """Write table[j] = the number that codes[j] stands for (`adapter_table.code_of`). Grid: one program."""
    for j in tl.static_range(len(codes)):
        tl.store(table + j, (codes[j] - SHIFT) >> 1)


@triton.jit
def fill_stack(table, codes, steps):
    """Write the numbers of adapter i = codes[j] + i · steps[j], which come as in `fill`. Grid: one program to each
    adapter."""
    i = tl.program_id(0)
    for j in tl.static_range(len(codes)):
        number, step = (codes[j] - SHIFT) >> 1, (steps[j] - SHIFT) >> 1
        tl.store(table + i * FIELDS + j, number + i * step)


@triton.jit
def field(table, i, PLACE: tl.constexpr):
    """Return a number of adapter i."""
    return tl.load(table + i * FIELDS + PLACE)


@triton.jit
def real(table, i, PLACE: tl.constexpr):
    """Return a number of adapter i that is kept as the bits of an fp32."""
    return field(table, i, PLACE).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def tiles_of(starts, n, BLOCK_M: tl.constexpr, ADAPTERS: tl.constexpr):
    """Return the number of tiles of BLOCK_M rows of each adapter. ADAPTERS is a power of two, at least n."""
    each = tl.arange(0, ADAPTERS)
    first = tl.load(starts + each, mask=each < n, other=0)
    return tl.cdiv(tl.load(starts + each + 1, mask=each < n, other=0) - first, BLOCK_M)


@triton.jit
def find(tile, starts, n, BLOCK_M: tl.constexpr, ADAPTERS: tl.constexpr):
    """Return (i, place): tile number `tile`, counted over all adapters, begins at the row `place` of adapter i. i is at
    least n where there are fewer tiles."""
    tiles = tiles_of(starts, n, BLOCK_M, ADAPTERS)
    i = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, ADAPTERS) < i, tiles, 0), 0)
    return i, (tile - before) * BLOCK_M


@triton.jit
def own_rows(order, starts, table, i, place, BLOCK_M: tl.constexpr):
    """Return the tile of adapter i that begins at its row `place`."""
    start = tl.load(starts + i)
    count = tl.load(starts + i + 1) - start - place
    row = tl.arange(0, BLOCK_M)
    rows = tl.load(order + start + place + row, mask=row < count, other=0)
    return Own(place, start + place, count, field(table, i, RANK).to(tl.int32), rows, row < count)


@triton.jit
def first_of(table, starts, i, n, ADAPTERS: tl.constexpr):
    """Return where the h of adapter i begins in the buffer of all: Σ M_j R_j over j < i."""
    each = tl.arange(0, ADAPTERS)
    before = (each < n) & (each < i)
    count = tl.load(starts + each + 1, mask=before, other=0) - tl.load(starts + each, mask=before, other=0)
    return tl.sum(tl.load(table + each * FIELDS + RANK, mask=before, other=0) * count, 0)


@triton.jit
def factor_of(table, i, WHICH: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, TYPE: tl.constexpr):
    """Return a_i or b_i, as WHICH says. UNIT names the stride that is 1 in all adapters: "c", "r", or "" for neither.
    With ALIGNED the base and the other stride are multiples of 16 bytes in all."""
    at = field(table, i, WHICH)
    if WHICH == A:
        stride_c, stride_r = field(table, i, STRIDE_AK), field(table, i, STRIDE_AR)
    else:
        stride_c, stride_r = field(table, i, STRIDE_BN), field(table, i, STRIDE_BR)
    if ALIGNED:
        elements: tl.constexpr = 128 // TYPE.primitive_bitwidth
        at, stride_c, stride_r = (
            tl.multiple_of(at, 16), tl.multiple_of(stride_c, elements), tl.multiple_of(stride_r, elements)
        )  # fmt: skip
    at = at.to(tl.pointer_type(TYPE))
    if UNIT == "c":
        found = Factor(at, 1, stride_r)
    elif UNIT == "r":
        found = Factor(at, stride_c, 1)
    else:
        found = Factor(at, stride_c, stride_r)
    return found


@triton.jit
def keep_of(table, i, starts, DROPOUT: tl.constexpr, SEGMENTS: tl.constexpr):
    """Return the mask of adapter i, which with SEGMENTS is a part of one over all rows. Without DROPOUT it is not
    used."""
    if DROPOUT:
        first = 0
        if SEGMENTS:
            first = tl.load(starts + i)
        found = Keep(tl.load(field(table, i, SEED).to(tl.pointer_type(tl.int64))), field(table, i, THRESHOLD), first)
    else:
        found = Keep(0, 0, 0)
    return found


@triton.jit
def kept(tile, keep, place, c, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr):
    """Return keep ⊙ tile, for the rows from the adapter's row `place` on and the columns from c on."""
    if DROPOUT:
        tile = keep_x(tile, keep.seed, keep.first + place, c, keep.T, BLOCK_M, BLOCK_C)
    return tile


@triton.jit
def load_rows(z, own, stride_zm, stride_zc, c, end, BLOCK_C: tl.constexpr):
    """Return z[own rows, c : c + BLOCK_C], zero in the rows of others and from column `end` on."""
    col = c + tl.arange(0, BLOCK_C)
    at = z + own.rows.to(tl.int64)[:, None] * stride_zm + col.to(tl.int64)[None, :] * stride_zc
    return tl.load(at, mask=own.mine[:, None] & (col < end)[None, :], other=0.0)
