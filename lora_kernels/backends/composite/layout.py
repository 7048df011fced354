"""What the launches of a list of layers have in common: the layout of the operands, and what follows from it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.composite import tiles
from lora_kernels.backends.composite.kernels.forward import down
from lora_kernels.backends.triton.device import Frame, cdiv
from lora_kernels.backends.triton.launch import precision_of
from lora_kernels.core.dropout import threshold
from lora_kernels.core.operands import Adapter
from lora_kernels.plans.tiles import Gpu


class Layout(NamedTuple):
    """What the constant arguments of the launches of a list depend on. It is hashable."""

    gpu: Gpu
    M: int
    K: int
    N: tuple[int, ...]
    R: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    """The strides of the operands, each as a tuple with one entry for every layer, in the order of the kernels'
    arguments."""
    x_strides: tuple[int, ...]
    p: tuple[float, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    """The dtypes of x and of the adapters."""
    precision: str
    """The precision of the products of fp32 operands that give h, g, da and db: "ieee" or "tf32"."""
    precision_16: str
    """The precision of those that give y and dx, which are rounded to x's dtype."""

    @property
    def block_r(self) -> int:
        """The BLOCK_R that all layers share."""
        return max(tiles.block_r(R) for R in self.R)

    @property
    def chunks(self) -> int:
        """The number of blocks of the rank. A list of several layers has one."""
        return cdiv(max(self.R), self.block_r)

    @property
    def rank(self) -> int:
        """The ranks, rounded up: the row length of the arrays of parts and of g."""
        return self.block_r * self.chunks

    @property
    def dropout(self) -> bool:
        """Whether any layer has dropout."""
        return any(self.p)


def layout_of(
    gpu: Gpu, rows: Tensor, x: Tensor, adapters: Sequence[Adapter], strides: Sequence[tuple[int, ...]]
) -> Layout:
    """Return the layout of a list. `rows` is x or a dy; `strides` has the strides of every operand, for each layer."""
    dtypes = rows.dtype, adapters[0].a.dtype
    layers = tuple([(a.shape, b.shape[0], p) for a, b, _, p, _ in adapters])
    precision = precision_of(dtypes[1])
    return _layout(gpu, rows.shape[0], layers, x.stride(), tuple(strides), dtypes, precision)


@functools.lru_cache(maxsize=4096)
def _layout(
    gpu: Gpu, M: int, layers: tuple[tuple[torch.Size, int, float], ...], x_strides: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, torch.dtype], precision: str,
) -> Layout:  # fmt: skip
    a, N, p = zip(*layers, strict=True)
    by_operand = tuple(zip(*strides, strict=True))
    # Beside an x in bf16, tf32 keeps more bits of h and g than y and dx have. Beside fp16 it would not.
    mixed = dtypes == (torch.bfloat16, torch.float32)
    tf32 = mixed and gpu.arch.startswith("sm_") and gpu.arch != "sm_75"
    ranks = tuple(shape[0] for shape in a)
    return Layout(
        gpu, M, a[0][1], N, ranks, by_operand, x_strides, p, dtypes, precision, "tf32" if tf32 else precision
    )  # fmt: skip


def down_frame(
    layout: Layout, K: int, x_strides: tuple[int, ...], a_strides: tuple[tuple[int, ...], tuple[int, ...]],
    R: tuple[int, ...], first: int, dropout: bool,
) -> tuple[Frame, int]:  # fmt: skip
    """Return the frame of `down` for an x of K columns and the layers of ranks R, and the rows of its parts."""
    tile, layers = tile_of(layout, tiles.DOWN), len(R)
    blocks = cdiv(layout.M, tile.BLOCK_M) * layers * layout.chunks
    steps, splits = tiles.split(K, tile.BLOCK_C, blocks, layout.gpu.multiprocessors)
    arguments = block_arguments(layout, tile) | {
        "stride_xm": x_strides[0],
        "stride_xk": x_strides[1],
        "stride_ar": a_strides[0],
        "stride_ak": a_strides[1],
        "M": layout.M,
        "K": K,
        "R": R,
        "T": tuple(map(threshold, layout.p))[:layers],
        "first": first,
        "steps": steps,
        "splits": splits,
        "DROPOUT": dropout,
    }
    return Frame(down, blocks * splits, arguments, options_of(tile)), layers * splits * layout.M


def tile_of(layout: Layout, kernel: str) -> tiles.Tile:
    # Beside an x in 16 bits the products of `up` alone are all in tf32, or none is.
    rows_dtype, adapter_dtype = layout.dtypes
    on_matrix_units = kernel == tiles.UP and layout.precision_16 == "tf32"
    itemsize = (rows_dtype if on_matrix_units else adapter_dtype).itemsize
    return tiles.tile_of(kernel, layout.gpu.arch, itemsize, layout.M, layout.block_r)


def block_arguments(layout: Layout, tile: tiles.Tile) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_C": tile.BLOCK_C,
        "BLOCK_R": layout.block_r,
        "CHUNKS": layout.chunks,
        "PRECISION": layout.precision,
    }


def options_of(tile: tiles.Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def codes_of(numbers: Iterable[int]) -> tuple[int, ...]:
    """Return a tuple of numbers that change with M as the kernels take it, with 2 n + 3 in place of n.

    Triton compiles a kernel of its own for every entry of a tuple that is 1 or a multiple of 16, and do_not_specialize
    does not reach into tuples. A code is neither, so a new M needs no new kernel.
    """
    return tuple([2 * n + 3 for n in numbers])


def ends_of(programs: Sequence[int]) -> tuple[int, ...]:
    """Return the code of the number after the last program of each layer."""
    return codes_of(itertools.accumulate(programs))


def seeds_of(seeds: Sequence[Tensor | None], other: Tensor) -> tuple[Tensor, ...]:
    """Return one tensor to each layer. A layer without dropout takes the seed of another, and a threshold of 0 keeps
    all of its x. Without any dropout the kernels read no seed, but the argument needs a tensor."""
    some = next((seed for seed in seeds if seed is not None), other)
    return tuple(some if seed is None else seed for seed in seeds)
