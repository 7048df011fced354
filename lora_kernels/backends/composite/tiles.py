"""The tiles of the kernels of `composite`, and how their work is split between programs.

The tiles were chosen by compiling ahead of time, not yet by running on a GPU. The test suite compiles every entry: none
spills registers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """The block sizes and compiler options of one kernel."""

    BLOCK_M: int
    """The rows of x, dy or y in a block."""
    BLOCK_C: int
    """The columns of x, dy or y in a block."""
    num_warps: int
    num_stages: int


DOWN, UP, OVER_DY, OVER_X, OVER_X_OF_LIST = "down", "up", "over_dy", "over_x", "over_x_of_list"
"""The kernels that have tiles: `forward.down`, `forward.up`, `backward.pass_over_dy`, and `backward.pass_over_x` of one
layer and of a list of several."""

MANY, FEW = "many", "few"
"""The tables for any number of rows, and for at most `FEW_ROWS`."""
FEW_ROWS = 16

SUM_C, SUM_WARPS = 32, 4
"""The columns of a tile, and the warps, of `backward.add_parts`."""

MAX_BLOCK_R = 128
"""A larger rank is computed in chunks of this size."""
MAX_BOTH = 32
"""Up to this BLOCK_R one pass over dy makes both g and db. Above it the parts of g, of which there is one to each block
of columns, would take as much memory traffic as a second pass over dy."""
MAX_LAYERS = 3
"""The longest list that one set of launches serves. Longer lists are served in pieces."""

Tables = dict[str, dict[str, dict[int, Tile]]]
"""Tiles by number of rows, kernel and BLOCK_R."""

MATRIX: Tables = {
    MANY: {
        DOWN: {16: Tile(128, 64, 8, 3), 32: Tile(64, 64, 8, 3), 64: Tile(64, 64, 8, 3), 128: Tile(64, 64, 8, 2)},
        UP: {16: Tile(64, 128, 4, 2), 32: Tile(64, 128, 8, 2), 64: Tile(64, 128, 8, 2), 128: Tile(64, 64, 8, 2)},
        OVER_DY: {16: Tile(32, 256, 8, 3), 32: Tile(32, 256, 8, 3), 64: Tile(32, 128, 8, 3), 128: Tile(32, 128, 8, 3)},
        OVER_X: {16: Tile(32, 64, 4, 3), 32: Tile(32, 64, 4, 3), 64: Tile(64, 32, 4, 2), 128: Tile(16, 32, 4, 2)},
        OVER_X_OF_LIST: {16: Tile(32, 32, 8, 2), 32: Tile(16, 32, 8, 2), 64: Tile(16, 32, 8, 3)},
    },
    FEW: {
        DOWN: {16: Tile(16, 128, 4, 3), 32: Tile(16, 128, 4, 3), 64: Tile(16, 64, 4, 3), 128: Tile(16, 64, 4, 2)},
        UP: {16: Tile(16, 128, 4, 2), 32: Tile(16, 128, 4, 2), 64: Tile(16, 128, 4, 2), 128: Tile(16, 64, 4, 2)},
        OVER_DY: {16: Tile(16, 64, 4, 2), 32: Tile(16, 64, 4, 2), 64: Tile(16, 64, 4, 2), 128: Tile(16, 64, 8, 2)},
        OVER_X: {16: Tile(16, 64, 4, 1), 32: Tile(16, 64, 4, 1), 64: Tile(16, 64, 4, 1), 128: Tile(16, 32, 4, 2)},
        OVER_X_OF_LIST: {16: Tile(16, 32, 4, 1), 32: Tile(16, 16, 4, 1), 64: Tile(16, 32, 8, 1)},
    },
}
"""The tiles for products that the matrix units of a GPU compute: those of adapters in 16 bits, and `up` beside an x in
bf16, from sm_80 and on gfx9."""

FAMILIES: dict[str, dict[str, dict[int, Tile]]] = {
    "sm_90": {OVER_X_OF_LIST: {64: Tile(32, 32, 8, 2)}},
    "sm_10": {OVER_X: {16: Tile(64, 64, 8, 2), 32: Tile(64, 64, 8, 2)}},
    "sm_12": {OVER_X_OF_LIST: {64: Tile(16, 32, 8, 2)}},
    "gfx9": {
        OVER_DY: {32: Tile(32, 128, 4, 3), 64: Tile(32, 128, 4, 3)},
        OVER_X_OF_LIST: {64: Tile(16, 16, 4, 2)},
    },
}
"""Other tiles than those of `MATRIX`, for many rows, where registers would spill: by the beginning of the
architecture's name."""

ORDINARY: Tables = {
    MANY: {
        DOWN: {16: Tile(32, 32, 4, 2), 32: Tile(32, 32, 4, 2), 64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 1)},
        UP: {16: Tile(32, 64, 4, 2), 32: Tile(32, 64, 4, 2), 64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 4, 1)},
        OVER_DY: {16: Tile(32, 64, 4, 2), 32: Tile(32, 64, 4, 2), 64: Tile(32, 64, 8, 2), 128: Tile(16, 32, 8, 2)},
        OVER_X: {16: Tile(32, 32, 4, 2), 32: Tile(32, 32, 8, 2), 64: Tile(32, 16, 8, 1), 128: Tile(16, 16, 8, 1)},
        OVER_X_OF_LIST: {16: Tile(32, 32, 8, 1), 32: Tile(32, 16, 8, 1), 64: Tile(32, 16, 8, 1)},
    },
    FEW: {
        DOWN: {16: Tile(16, 32, 4, 2), 32: Tile(16, 32, 4, 2), 64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 8, 1)},
        UP: {16: Tile(16, 64, 4, 2), 32: Tile(16, 64, 4, 2), 64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 4, 1)},
        OVER_DY: {16: Tile(16, 32, 4, 2), 32: Tile(16, 32, 4, 2), 64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 8, 2)},
        OVER_X: {16: Tile(16, 32, 4, 1), 32: Tile(16, 32, 4, 1), 64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 8, 1)},
        OVER_X_OF_LIST: {16: Tile(16, 16, 4, 1), 32: Tile(16, 16, 4, 1), 64: Tile(16, 16, 8, 1)},
    },
}
"""The tiles for products that ordinary instructions may compute: those of adapters in fp32, and all on sm_75 and
gfx1x. They take more registers. No block has 64 rows of a product under dropout: before 3.8 Triton computes such a
product of fp32 on sm_100's tensor cores, in tf32 whatever precision was asked for."""

CONVERTED: dict[str, dict[str, dict[int, Tile]]] = {
    "sm_10": {OVER_DY: {16: Tile(32, 32, 4, 2), 32: Tile(32, 32, 4, 2), 64: Tile(32, 32, 8, 2)}},
}
"""Other tiles than those of `ORDINARY`, for many rows, by the beginning of the architecture's name. Triton before 3.8
puts products of 64 rows that the kernel has converted to fp32 onto sm_100's tensor cores; these tiles avoid it."""

DOWN_MULTI, UP_MULTI, ACROSS_MULTI = "down_multi", "up_multi", "across_multi"
"""The kernels of many adapters that have tiles: those of `kernels.multi`."""

MULTI: dict[str, dict[str, Tile]] = {
    "matrix": {
        DOWN_MULTI: Tile(32, 128, 4, 3),
        UP_MULTI: Tile(32, 64, 8, 2),
        ACROSS_MULTI: Tile(32, 64, 4, 3),
    },
    "ordinary": {
        DOWN_MULTI: Tile(16, 32, 4, 2),
        UP_MULTI: Tile(32, 32, 8, 1),
        ACROSS_MULTI: Tile(32, 32, 4, 2),
    },
}
"""The tiles for many adapters, for products that matrix units or ordinary instructions compute. There is one for all
numbers of rows and adapters, because nothing that belongs to an adapter may depend on its neighbours in the batch."""

SPLITS_MULTI = 4
"""The number of parts of h and of g, over the columns of x and of dy."""
PART_MULTI = 512
"""The rows of one adapter that a part of its da or db is summed over. A multiple of every BLOCK_M."""

PROGRAMS_PER_MULTIPROCESSOR = 2
"""The number of programs that a launch should have at least, for each multiprocessor: enough loads are under way then,
and a larger number costs more parts."""


def uses_matrix_units(arch: str, itemsize: int) -> bool:
    """Return whether `MATRIX` serves adapters whose elements have `itemsize` bytes."""
    return itemsize == 2 and arch != "sm_75" and not arch.startswith("gfx1")


def max_rank_of_list(arch: str, itemsize: int) -> int:
    """Return the largest sum of the BLOCK_R of a list that one set of launches serves: a program of the pass over x
    holds a tile of each da."""
    return 192 if uses_matrix_units(arch, itemsize) else 96


def block_r(R: int) -> int:
    """Return BLOCK_R for rank R: a power of two and at least 16, the least that tensor cores take."""
    return min(MAX_BLOCK_R, max(16, 1 << (R - 1).bit_length()))


def tile_of(kernel: str, arch: str, itemsize: int, M: int, BLOCK_R: int) -> Tile:
    """Return the tile of a kernel for M rows of x and adapters whose elements have `itemsize` bytes; for `up` those of
    x."""
    matrix = uses_matrix_units(arch, itemsize)
    if rows_of(M) == MANY:
        for family, table in (FAMILIES if matrix else CONVERTED).items():
            if arch.startswith(family) and BLOCK_R in table.get(kernel, {}):
                return table[kernel][BLOCK_R]
    return (MATRIX if matrix else ORDINARY)[rows_of(M)][kernel][BLOCK_R]


def tile_of_multi(kernel: str, arch: str, itemsize: int) -> Tile:
    """Return the tile of a kernel of many adapters, by the size of the elements that decides in `tile_of`."""
    return MULTI["matrix" if uses_matrix_units(arch, itemsize) else "ordinary"][kernel]


def tiles_of_multi(M: int, n: int, block: int) -> int:
    """Return the largest number of tiles of `block` rows that M rows can take if they are divided among n adapters."""
    return min(M, (M + n * (block - 1)) // block)


def rows_of(M: int) -> str:
    """Return which of the tables M rows use."""
    return FEW if M <= FEW_ROWS else MANY


def split(length: int, block: int, others: int, multiprocessors: int) -> tuple[int, int]:
    """Return (steps, ranges): `length` is cut into `ranges` ranges of `steps` blocks.

    There are as many ranges as fit into one wave of programs, where each range takes `others` programs. Both are 0
    where `length` is.
    """
    blocks = -(-length // block)
    wanted = max(1, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // max(1, others))
    steps = -(-blocks // wanted)
    return steps, -(-blocks // steps) if blocks else 0
