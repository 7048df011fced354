"""The launches of many adapters over the rows of one x.

Their grids and the sizes of their memory follow from the sizes of the operands alone. So a graph that has captured them
serves any division of the rows among the adapters, and nothing waits for the GPU.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.composite import tiles
from lora_kernels.backends.composite.adapter_table import Facts, Lies, Table
from lora_kernels.backends.composite.kernels import adapters as own
from lora_kernels.backends.composite.kernels.multi import across_multi, add_parts_multi, down_multi, up_multi
from lora_kernels.backends.triton.device import Frame, cdiv
from lora_kernels.backends.triton.launch import precision_of
from lora_kernels.core.operands import power_of_two
from lora_kernels.core.rows import Rows
from lora_kernels.plans.tiles import Gpu

FORWARD, BACKWARD = "forward", "backward"
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Shape(NamedTuple):
    """What the constant arguments of the launches depend on. It is hashable."""

    gpu: Gpu
    facts: Facts
    M: int
    columns: int
    """The columns of z, which is x or dy."""
    strides: tuple[int, ...]
    """The strides of z."""
    dtype: torch.dtype
    """The dtype of z."""
    precision: str
    """The precision of products of fp32, by ``torch.get_float32_matmul_precision()``."""

    @property
    def rank(self) -> int:
        """The row length of the arrays of parts."""
        narrow, wide = own.NARROW.value, own.WIDE.value
        return narrow if self.facts.rank <= narrow else wide * cdiv(self.facts.rank, wide)

    @property
    def chunks(self) -> int:
        """The number of blocks of the largest rank."""
        return cdiv(self.facts.rank, own.WIDE.value)

    @property
    def precision_out(self) -> str:
        """The precision of the products that give y and dx. Beside an x in bf16, tf32 keeps more bits of h and g than y
        and dx have."""
        mixed = (self.dtype, self.facts.dtype) == (torch.bfloat16, torch.float32)
        arch = self.gpu.arch
        return "tf32" if mixed and arch.startswith("sm_") and arch != "sm_75" else self.precision

    def tile(self, kernel: str) -> tiles.Tile:
        """Return the tile of a kernel."""
        on_matrix_units = kernel == tiles.UP_MULTI and self.precision_out == "tf32" and self.dtype.itemsize == 2
        dtype = self.dtype if on_matrix_units else self.facts.dtype
        return tiles.tile_of_multi(kernel, self.gpu.arch, dtype.itemsize)

    def frame(self, kernel: Any, programs: int, tile: tiles.Tile, **arguments: Any) -> Frame:
        """Return the launch of a kernel, with the arguments that all kernels have beside `arguments`."""
        common = {
            "stride_zm": self.strides[0],
            "stride_zc": self.strides[1],
            "M": self.M,
            "COLUMNS": self.columns,
            "n": self.facts.n,
            "rank": self.rank,
            "chunks": self.chunks,
            "BLOCK_M": tile.BLOCK_M,
            "BLOCK_C": tile.BLOCK_C,
            "ADAPTERS": max(16, power_of_two(self.facts.n)),
            "TYPE": _TYPES[self.facts.dtype],
            "PRECISION": self.precision,
            "SEGMENTS": self.facts.segments,
            **arguments,
        }
        given = {name: value for name, value in common.items() if name in kernel.arg_names}
        return Frame(kernel, programs, given, {"num_warps": tile.num_warps, "num_stages": tile.num_stages})


def shape_of(gpu: Gpu, z: Tensor, table: Table) -> Shape:
    """Return the shape of the launches that read z."""
    M, columns = z.shape
    return Shape(gpu, table.facts, M, columns, z.stride(), z.dtype, precision_of(table.facts.dtype))


def low_rank(gpu: Gpu, op: str, z: Tensor, table: Table, rows: Rows, h: Tensor | None, out: Tensor | None) -> None:
    """In a forward, where z is x and `out` y, add s_i · h_i b_iᵀ to the rows of each adapter, and write h. In a
    backward, where z is dy and `out` dx, add c_i · keep ⊙ (g_i a_i), and write g to `h`. Either may be None."""
    shape = shape_of(gpu, z, table)
    columns = 0 if out is None else out.shape[1]
    down, up, floats = _low_rank(shape, op, columns, h is not None)
    part = torch.empty(floats, dtype=torch.float32, device=z.device)
    who = {"order": rows.order, "starts": rows.starts, "table": table.numbers}
    down.run(z=z, part=part, **who)
    # The kernel does not use what is None, but every argument needs a tensor of some type.
    up.run(part=part, h=part if h is None else h, out=z if out is None else out, **who)


def gradients(gpu: Gpu, of: str, z: Tensor, table: Table, rows: Rows, u: Tensor) -> None:
    """Write every da that is in the table, where `of` is "a", z is x and u is g; or every db, where `of` is "b", z is
    dy and u is h."""
    across, add, floats = _gradients(shape_of(gpu, z, table), of)
    part = torch.empty(floats, dtype=torch.float32, device=z.device)
    across.run(z=z, order=rows.order, starts=rows.starts, table=table.numbers, u=u, part=part)
    add.run(starts=rows.starts, table=table.numbers, part=part)


@functools.lru_cache(maxsize=4096)
def _low_rank(shape: Shape, op: str, columns: int, save: bool) -> tuple[Frame, Frame, int]:
    """Return the launches of `down_multi` and `up_multi`, and the size of the parts."""
    M, facts, forward = shape.M, shape.facts, op == FORWARD
    tile = shape.tile(tiles.DOWN_MULTI)
    # The split depends on the columns alone, so that the sum of a row does not depend on other rows.
    blocks = cdiv(shape.columns, tile.BLOCK_C)
    steps = max(1, cdiv(blocks, tiles.SPLITS_MULTI))
    splits = cdiv(blocks, steps)
    down = shape.frame(
        down_multi,
        tiles.tiles_of_multi(M, facts.n, tile.BLOCK_M) * splits * shape.chunks,
        tile,
        steps=steps,
        splits=splits,
        DROPOUT=forward and facts.dropout,
        **_factor("a" if forward else "b", facts),
    )
    tile = shape.tile(tiles.UP_MULTI)
    found = tiles.tiles_of_multi(M, facts.n, tile.BLOCK_M)
    steps, ranges = tiles.split(columns, tile.BLOCK_C, found, shape.gpu.multiprocessors)
    up = shape.frame(
        up_multi,
        found * max(1, ranges),
        tile,
        COLUMNS=columns,
        splits=splits,
        steps=steps,
        ranges=max(1, ranges),
        DROPOUT=not forward and facts.dropout,
        SAVE=save,
        PRECISION=shape.precision_out,
        **_factor("b" if forward else "a", facts),
    )
    return down, up, splits * M * shape.rank


@functools.lru_cache(maxsize=4096)
def _gradients(shape: Shape, of: str) -> tuple[Frame, Frame, int]:
    """Return the launches of `across_multi` and `add_parts_multi`, and the size of the parts."""
    tile, n = shape.tile(tiles.ACROSS_MULTI), shape.facts.n
    parts = tiles.tiles_of_multi(shape.M, n, tiles.PART_MULTI)
    out = (own.DA if of == "a" else own.DB).value
    across = shape.frame(
        across_multi,
        parts * cdiv(shape.columns, tile.BLOCK_C) * shape.chunks,
        tile,
        PART=tiles.PART_MULTI,
        OUT=out,
        DROPOUT=of == "a" and shape.facts.dropout,
    )
    tile = tiles.Tile(0, tiles.SUM_C, tiles.SUM_WARPS, 2)
    programs = n * cdiv(shape.columns, tile.BLOCK_C) * shape.chunks
    add = shape.frame(add_parts_multi, programs, tile, PART=tiles.PART_MULTI, OUT=out)
    return across, add, parts * shape.columns * shape.rank


def _factor(which: str, facts: Facts) -> dict[str, Any]:
    """Return the arguments that say which of a and b a kernel reads, and how."""
    lies: Lies = facts.a if which == "a" else facts.b
    return {"WHICH": (own.A if which == "a" else own.B).value, "UNIT": lies.unit, "ALIGNED": lies.aligned}
