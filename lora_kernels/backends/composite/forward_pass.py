"""The launches of a forward: `down` makes the parts of every h, `up` adds them and begins every y."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.composite import tiles
from lora_kernels.backends.composite.kernels.forward import up
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
from lora_kernels.core.dropout import rescale
from lora_kernels.core.operands import Adapter, Base, MaybeTensors, Tensors
from lora_kernels.plans.tiles import Gpu


class Frames(NamedTuple):
    """The launches of a forward, and the size of the parts of every h."""

    floats: int
    down: Frame
    up: Frame


def low_rank(
    gpu: Gpu, x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], ys: Tensors, hs: MaybeTensors, add: bool
) -> None:
    """Write y = bias + s · h bᵀ of every layer, or with `add` add s · h bᵀ to it. Write its h where that is not
    None."""
    strides = [
        (*a.stride(), *b.stride(), 0 if bias is None else bias.stride(0))
        for (a, b, *_), (_, bias) in zip(adapters, bases, strict=True)
    ]
    has_bias = tuple([base.bias is not None for base in bases])
    save_h = tuple([h is not None for h in hs])
    frames = _frames(layout_of(gpu, x, x, adapters, strides), has_bias, save_h, add)
    part = x.new_empty(frames.floats, dtype=torch.float32)
    a, b, scale, _, seed = zip(*adapters, strict=True)
    frames.down.run(x=x, a=a, part=part, seed=seeds_of(seed, x))
    # The kernel does not use what a layer lacks, but every argument needs a tensor of the right type.
    frames.up.run(
        part=part,
        b=b,
        bias=tuple([y if base.bias is None else base.bias for y, base in zip(ys, bases, strict=True)]),
        h=tuple([like if h is None else h for h, like in zip(hs, b, strict=True)]),
        y=tuple(ys),
        scale=scale,
    )


@functools.lru_cache(maxsize=4096)
def _frames(layout: Layout, has_bias: tuple[bool, ...], save_h: tuple[bool, ...], add: bool) -> Frames:
    M, N, layers = layout.M, layout.N, len(layout.N)
    ar, ak, bn, br, bias = layout.strides
    down, rows = down_frame(layout, layout.K, layout.x_strides, (ar, ak), layout.R, 0, layout.dropout)
    tile = tile_of(layout, tiles.UP)
    blocks = cdiv(M, tile.BLOCK_M)
    ways = [tiles.split(n, tile.BLOCK_C, blocks * layers, layout.gpu.multiprocessors) for n in N]
    programs = [blocks * ranges for _, ranges in ways]
    arguments = block_arguments(layout, tile) | {
        "stride_bn": bn,
        "stride_br": br,
        "stride_bias": bias,
        "M": M,
        "N": N,
        "R": layout.R,
        "c": tuple(map(rescale, layout.p)),
        "save_h": tuple(map(int, save_h)),
        "has_bias": tuple(map(int, has_bias)),
        "splits": down.arguments["splits"],
        "steps": codes_of(steps for steps, _ in ways),
        "ranges": codes_of(ranges for _, ranges in ways),
        "ends": ends_of(programs),
        "ADD": add,
        "PRECISION": layout.precision_16,
    }
    return Frames(rows * layout.rank, down, Frame(up, sum(programs), arguments, options_of(tile)))
