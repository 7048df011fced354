"""The launches of a backward: one pass over every dy, the sums of its parts, one pass over x, the sums of its parts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.composite import tiles
from lora_kernels.backends.composite.kernels.backward import add_parts, pass_over_dy, pass_over_x
from lora_kernels.backends.composite.layout import (
    Layout,
    block_arguments,
    codes_of,
    down_frame,
    ends_of,
    layout_of,
    options_of,
    seeds_of,
    tile_of,
)
from lora_kernels.backends.triton.device import Frame, cdiv
from lora_kernels.core.dropout import rescale, threshold
from lora_kernels.core.operands import Adapter, MaybeTensors, Tensors
from lora_kernels.plans.tiles import Gpu


class Wanted(NamedTuple):
    """The gradients that a list is asked for. All its layers are asked for the same."""

    dx: bool
    da: bool
    db: bool

    @property
    def g(self) -> bool:
        """Whether g is needed for them."""
        return self.dx or self.da


class Frames(NamedTuple):
    """The launches of a backward, and the memory that they need."""

    floats: int
    """The size of the parts: those of da take the place of those of g and db."""
    rank: int
    over_dy: Frame | None
    """Makes the parts of db, and of g where `down` does not."""
    downs: tuple[Frame, ...]
    """One launch to each layer, that makes the parts of its g."""
    add: Frame
    """Adds the parts of g, and those of db."""
    over_x: tuple[Frame, ...]
    """Make dx₀ and the parts of da."""
    add_da: Frame | None


def low_rank(
    gpu: Gpu, dys: Tensors, x: Tensor | None, adapters: Sequence[Adapter], hs: MaybeTensors, dx: Tensor | None,
    das: MaybeTensors, dbs: MaybeTensors,
) -> None:  # fmt: skip
    """Write dx = Σ over the layers c · keep ⊙ (g a), da and db: those that are not None, at least one of them."""
    wanted = Wanted(dx is not None, das[0] is not None, dbs[0] is not None)
    a, b, scale, _, seed = zip(*adapters, strict=True)
    # The kernels do not read what no gradient needs, but every argument needs a tensor of the right type.
    h: tuple[Any, ...] = tuple(hs) if wanted.db else b
    x = dys[0] if x is None else x
    strides = [
        (*ai.stride(), *bi.stride(), *dy.stride(), *hi.stride()) for ai, bi, dy, hi in zip(a, b, dys, h, strict=True)
    ]
    layout = layout_of(gpu, dys[0], x, adapters, strides)
    frames = _frames(layout, wanted)
    part = x.new_empty(frames.floats, dtype=torch.float32)
    if frames.over_dy is not None:
        frames.over_dy.run(dy=tuple(dys), b=b, h=h, part=part)
    for down, dy, each in zip(frames.downs, dys, b, strict=False):
        down.run(x=dy, a=(each,), part=part, seed=(dy,))
    if wanted.g:
        g = b[0].new_empty(len(dys), layout.M, frames.rank)
        # The kernel takes the strides of a sum from its frame, so a g of one layer need not be unbound.
        sums: tuple[Tensor | None, ...] = g.unbind(0) if len(dys) > 1 else (g,)
        factors = scale
        if wanted.db:
            sums, factors = (*sums, *dbs), (*scale, *scale)
    else:
        g, sums, factors = part, tuple(dbs), scale
    frames.add.run(part=part, out=sums, factor=factors)
    for frame in frames.over_x:
        frame.run(x=x, a=a, g=g, dx=x if dx is None else dx, part=part, seed=seeds_of(seed, x))
    if frames.add_da is not None:
        frames.add_da.run(part=part, out=tuple(das))


@functools.lru_cache(maxsize=4096)
def _frames(layout: Layout, wanted: Wanted) -> Frames:
    M, K, N, R, layers = layout.M, layout.K, layout.N, layout.R, len(layout.N)
    _, _, bn, br, dym, dyn, hm, hr = layout.strides
    same = layout.dtypes[0] == layout.dtypes[1]  # else the blocks of dy are small, and the parts of g many
    both = wanted.g and wanted.db and same and layout.block_r <= tiles.MAX_BOTH
    sums: list[_Sum] = []
    rows, downs = 0, []
    over_dy: Frame | None = None
    dy_tile = tile_of(layout, tiles.OVER_DY)
    if wanted.g and not both:
        for i in range(layers):
            down, more = down_frame(layout, N[i], (dym[i], dyn[i]), ((br[i],), (bn[i],)), (R[i],), rows, False)
            downs.append(down)
            sums.append(_Sum(rows, down.arguments["splits"], M, layout.rank, (layout.rank, 1)))
            rows += more
    elif wanted.g:
        for n in N:
            cols = cdiv(n, dy_tile.BLOCK_C)
            sums.append(_Sum(rows, cols, M, layout.rank, (layout.rank, 1)))
            rows += cols * M
    if wanted.db:
        programs = sum(cdiv(n, dy_tile.BLOCK_C) for n in N) * layout.chunks
        blocks, splits = tiles.split(M, dy_tile.BLOCK_M, programs, layout.gpu.multiprocessors)
        first = tuple(rows + splits * sum(N[:i]) for i in range(layers))
        over_dy = Frame(
            pass_over_dy,
            programs * splits,
            block_arguments(layout, dy_tile)
            | {
                "stride_dym": dym,
                "stride_dyn": dyn,
                "stride_bn": bn,
                "stride_br": br,
                "stride_hm": hm,
                "stride_hr": hr,
                "M": M,
                "N": N,
                "R": R,
                "first_g": codes_of([each.first for each in sums] if both else first),
                "first_db": codes_of(first),
                "blocks": blocks,
                "ends": ends_of([cdiv(n, dy_tile.BLOCK_C) * layout.chunks * splits for n in N]),
                "NEED_G": both,
            },
            options_of(dy_tile),
        )
        sums += [_Sum(first[i], splits, N[i], R[i], (R[i], 1)) for i in range(layers)]
        rows += splits * sum(N)
    over_x, splits = _over_x(layout, wanted)
    add_da = None
    if wanted.da:
        factor = tuple(map(rescale, layout.p))
        add_da = _add(layout, [_Sum(i * splits * K, splits, K, R[i], (1, K)) for i in range(layers)], factor=factor)
        rows = max(rows, layers * splits * K)
    return Frames(rows * layout.rank, layout.rank, over_dy, tuple(downs), _add(layout, sums), over_x, add_da)


def _over_x(layout: Layout, wanted: Wanted) -> tuple[tuple[Frame, ...], int]:
    """Return the launches of the pass over x, and the number of parts of each da. A rank of several chunks takes one
    launch for dx and one for da."""
    tile = tile_of(layout, tiles.OVER_X if len(layout.N) == 1 else tiles.OVER_X_OF_LIST)
    ar, ak, *_ = layout.strides
    cols = cdiv(layout.K, tile.BLOCK_C)
    blocks, splits = tiles.split(layout.M, tile.BLOCK_M, cols, layout.gpu.multiprocessors)
    arguments = block_arguments(layout, tile) | {
        "stride_xm": layout.x_strides[0],
        "stride_xk": layout.x_strides[1],
        "stride_ar": ar,
        "stride_ak": ak,
        "M": layout.M,
        "K": layout.K,
        "R": layout.R,
        "T": tuple(map(threshold, layout.p)),
        "c": tuple(map(rescale, layout.p)),
        "blocks": blocks,
        "splits": splits,
        "DROPOUT": layout.dropout,
        # The tile of a list has no registers left for operands of the tensor cores beside those of ordinary products.
        "PRECISION_DX": layout.precision_16 if len(layout.N) == 1 else layout.precision,
    }
    if layout.chunks == 1:
        ways = [(wanted.dx, wanted.da)] if wanted.g else []
    else:
        ways = [way for way, need in (((True, False), wanted.dx), ((False, True), wanted.da)) if need]
    frames = [
        Frame(
            pass_over_x,
            cols * splits * (layout.chunks if da else 1),
            arguments | {"NEED_DX": dx, "NEED_DA": da},
            options_of(tile),
        )
        for dx, da in ways
    ]
    return tuple(frames), splits


class _Sum(NamedTuple):
    """One of the sums of `add_parts`."""

    first: int
    parts: int
    C: int
    R: int
    strides: tuple[int, int]
    """The strides of the result, as if it were [C, R]."""


def _add(layout: Layout, sums: Sequence[_Sum], **factor: tuple[float, ...]) -> Frame:
    programs = [cdiv(each.C, tiles.SUM_C) * layout.chunks for each in sums]
    first, parts, C, R, strides = zip(*sums, strict=True)
    stride_oc, stride_or = zip(*strides, strict=True)
    arguments = {
        "stride_oc": stride_oc,
        "stride_or": stride_or,
        "first": codes_of(first),
        "parts": codes_of(parts),
        "C": codes_of(C),
        "R": R,
        "ends": ends_of(programs),
        "BLOCK_C": tiles.SUM_C,
        "BLOCK_R": layout.block_r,
        "CHUNKS": layout.chunks,
        **factor,
    }
    return Frame(add_parts, sum(programs), arguments, {"num_warps": tiles.SUM_WARPS, "num_stages": 2})
