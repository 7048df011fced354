"""From tensors to a launch of the Triton kernels: the arguments, the grid and the workspace. Imported by
`backends.triton` only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels import random
from lora_kernels.kernels.backward import backward
from lora_kernels.kernels.forward import forward_redundant, forward_tickets
from lora_kernels.kernels.tiles import Plan

PROGRAMS_PER_MULTIPROCESSOR = 2
"""How many programs are launched to claim tickets. More than fit at once only find that no work is left."""


class Target(NamedTuple):
    """What a launch needs to know of the device it is for."""

    arch: str
    """"sm_90", "gfx942": what the tile tables are asked for."""
    multiprocessors: int
    guard: Callable[[], AbstractContextManager[Any]]
    """Makes the device the current one."""
    stream: Callable[[], int]
    """The current stream, as a number."""
    capturing: Callable[[], bool]
    """Whether that stream is being captured into a graph."""
    name: str | None = None
    """What the driver calls the device: what plans measured on it are kept under."""


class Launch(NamedTuple):
    """``kernel[grid](**arguments, **options)``."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        """On the current device and stream. Nothing is launched where there is no work."""
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def find_target(device: torch.device) -> Target | None:
    """The target of tensors on `device`: None where Triton cannot serve it. Asks the driver once per device."""
    if device not in TARGETS and device.type == "cuda" and torch.cuda.is_available():
        TARGETS[device] = _query(device)
    return TARGETS.get(device)


TARGETS: dict[torch.device, Target] = {}
"""Targets by device, as they become known."""


def _query(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Target(
        arch=arch,
        multiprocessors=properties.multi_processor_count,
        guard=functools.partial(torch.cuda.device, device),
        stream=lambda: torch.cuda.current_stream(device).cuda_stream,
        capturing=torch.cuda.is_current_stream_capturing,
        name=properties.name,
    )


_workspaces: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def workspace(device: torch.device, target: Target, counters: int, floats: int) -> tuple[Tensor, Tensor]:
    """(sync, part): `counters` int32 zeros, which a launch leaves zero, and room for `floats` fp32 partial sums.

    One pair per device and stream, because launches on one stream do not overlap; it grows to the largest that was
    asked for. A launch that is being captured gets its own, from the graph's memory pool, which lives as long as the
    graph and is zeroed at every replay.
    """
    if target.capturing():
        return _allocate(device, counters, floats)
    key = (device, target.stream())
    sync, part = _workspaces.get(key, (None, None))
    if sync is None or part is None or sync.numel() < counters or part.numel() < floats:
        held = (0, 0) if sync is None or part is None else (sync.numel(), part.numel())
        sync, part = _workspaces[key] = _allocate(device, max(counters, held[0]), max(floats, held[1]))
    return sync, part


def _allocate(device: torch.device, counters: int, floats: int) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(1 << max(counters - 1, 1023).bit_length(), dtype=torch.int32, device=device),
        torch.empty(floats, dtype=torch.float32, device=device),
    )


class Frame(NamedTuple):
    """What launches of one kind of call have in common."""

    kernel: Any
    programs: int
    counters: int
    floats: int
    """What they want of the workspace."""
    arguments: dict[str, Any]
    """All but the tensors and what depends on the scale."""
    options: dict[str, int]


def forward_launch(
    target: Target,
    plan: Plan,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    y: Tensor,
    h: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    save_h: bool,
) -> Launch:
    """y and h are written. h is room for [M,R] whether or not it is kept, except in a redundant plan, which writes it
    if `save_h`."""
    tile = plan.tile
    strides = (*x.stride(), *w.stride(), *a.stride(), *b.stride(), None if bias is None else bias.stride(0))
    frame = forward_frame(
        target.arch,
        target.multiprocessors,
        plan,
        precision_of(x.dtype),
        *x.shape,
        *b.shape,
        strides,
        p,
        seed is not None,
        save_h,
    )
    sync, part = workspace(x.device, target, frame.counters, frame.floats)
    arguments = {
        **frame.arguments,
        "x": _described(x, tile.BLOCK_M, tile.BLOCK_K) if tile.tma else x,
        "w": _described(w, tile.BLOCK_N, tile.BLOCK_K) if tile.tma else w,
        "a": a,
        "b": b,
        "bias": y if bias is None else bias,
        "y": y,
        "h": h,
        "seed": y if seed is None else seed,
        "sync": sync,
        **scaling(scale, b.shape[1]),
    }
    if plan.redundant:
        arguments["part"] = part
    return Launch(frame.kernel, frame.programs, arguments, frame.options)


@functools.lru_cache(maxsize=4096)
def forward_frame(
    arch: str,
    multiprocessors: int,
    plan: Plan,
    precision: str,
    M: int,
    K: int,
    N: int,
    R: int,
    strides: tuple[int | None, ...],
    p: float,
    dropout: bool,
    save_h: bool,
) -> Frame:
    tile = plan.tile
    BLOCK_R = tile.block_r(R)
    rows, cols, chunks = cdiv(M, tile.BLOCK_M), cdiv(N, tile.BLOCK_N), cdiv(R, BLOCK_R)
    names = ("xm", "xk", "wn", "wk", "ar", "ak", "bn", "br", "bias")
    arguments: dict[str, Any] = {
        **{f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)},
        "M": M,
        "N": N,
        "K": K,
        "R": R,
        "c": random.rescale(p),
        "T": random.threshold(p),
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": tile.BLOCK_K,
        "BLOCK_R": BLOCK_R,
        "GROUP_M": tile.GROUP_M,
        "HAS_BIAS": strides[-1] is not None,
        "DROPOUT": dropout,
        "TMA": tile.tma,
        "PRECISION": precision,
        "AMD": arch.startswith("gfx"),
    }
    if strides[-1] is None:
        arguments["stride_bias"] = 1
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if not plan.redundant:
        programs = min(rows * (chunks + cols), PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
        return Frame(forward_tickets, programs, 1 + rows, 0, arguments, options)
    steps = max(1, cdiv(K, plan.split * tile.BLOCK_K))
    splits = max(1, cdiv(K, steps * tile.BLOCK_K))
    floats = rows * cols * splits * tile.BLOCK_M * (tile.BLOCK_N + BLOCK_R) if splits > 1 else 0
    arguments |= {"steps": steps, "SAVE_H": save_h, "SPLIT": splits > 1}
    return Frame(forward_redundant, rows * cols * splits, rows * cols, floats, arguments, options)


def backward_launch(
    target: Target,
    plan: Plan,
    dy: Tensor,
    x: Tensor | None,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    g: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> Launch:
    """Those of dx, da and db are written that are not None; g is room for [M,R]."""
    tile = plan.tile
    # What is not needed is not touched, but a kernel has one type per argument.
    x = dy if x is None else x
    h = g if h is None else h
    strides = (*dy.stride(), *x.stride(), *w.stride(), *a.stride(), *b.stride(), *h.stride())
    needs = (dx is not None, da is not None, db is not None)
    frame = _backward_frame(
        target.arch,
        target.multiprocessors,
        plan,
        precision_of(dy.dtype),
        *dy.shape,
        *a.shape,
        strides,
        p,
        seed is not None,
        needs,
    )
    sync, part = workspace(dy.device, target, frame.counters, frame.floats)
    arguments = {
        **frame.arguments,
        "dy": dy,
        "dy_rows": _described(dy, tile.BLOCK_M, tile.BLOCK_N) if tile.tma else dy,
        "x": x,
        "w": _described(w, tile.BLOCK_N, tile.BLOCK_K) if tile.tma else w,
        "a": a,
        "b": b,
        "h": h,
        "g": g,
        "dx": g if dx is None else dx,
        "da": a if da is None else da,
        "db": b if db is None else db,
        "seed": g if seed is None else seed,
        "sync": sync,
        "part": part,
        "scale": scale,
    }
    return Launch(frame.kernel, frame.programs, arguments, frame.options)


@functools.lru_cache(maxsize=4096)
def _backward_frame(
    arch: str,
    multiprocessors: int,
    plan: Plan,
    precision: str,
    M: int,
    N: int,
    R: int,
    K: int,
    strides: tuple[int, ...],
    p: float,
    dropout: bool,
    needs: tuple[bool, bool, bool],
) -> Frame:
    tile = plan.tile
    need_dx, need_da, need_db = needs
    BLOCK_R = tile.block_r(R)
    rows, chunks = cdiv(M, tile.BLOCK_M), cdiv(R, BLOCK_R)
    blocks = max(1, cdiv(rows, plan.split))
    splits = max(1, cdiv(rows, blocks))
    tiles_da, tiles_db = need_da * cdiv(K, tile.BLOCK_C) * chunks, need_db * cdiv(N, tile.BLOCK_C) * chunks
    tiles_dx, tiles_g = need_dx * rows * cdiv(K, tile.BLOCK_K), (need_dx or need_da) * rows * chunks
    names = ("dym", "dyn", "xm", "xk", "wn", "wk", "ar", "ak", "bn", "br", "hm", "hr")
    arguments: dict[str, Any] = {
        **{f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)},
        "M": M,
        "N": N,
        "K": K,
        "R": R,
        "c": random.rescale(p),
        "T": random.threshold(p),
        "splits": splits,
        "blocks": blocks,
        "need_dx": int(need_dx),
        "need_da": int(need_da),
        "need_db": int(need_db),
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": tile.BLOCK_K,
        "BLOCK_R": BLOCK_R,
        "BLOCK_C": tile.BLOCK_C,
        "BLOCK_T": tile.BLOCK_T,
        "GROUP_M": tile.GROUP_M,
        "DROPOUT": dropout,
        "TMA": tile.tma,
        "PRECISION": precision,
        "AMD": arch.startswith("gfx"),
    }
    items = tiles_g + tiles_dx + (tiles_da + tiles_db) * splits
    return Frame(
        backward,
        programs=min(items, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors),
        counters=1 + rows + tiles_da + tiles_db,
        floats=(tiles_da + tiles_db) * splits * tile.BLOCK_C * BLOCK_R,
        arguments=arguments,
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )


def describable(*operands: Tensor) -> bool:
    """Whether tensor-map descriptors can be made of these matrices: not empty, unit last stride, rows and base at
    multiples of 16 bytes."""
    return all(
        t.stride(1) == 1
        and t.stride(0) > 0
        and t.numel() > 0
        and (t.stride(0) * t.element_size()) % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in operands
    )


def _described(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols])


def cdiv(n: int, d: int) -> int:
    return -(-n // d)


def scaling(scale: float, R: int) -> dict[str, float | int]:
    """A scale below 2⁻¹⁰⁰ counts as 0: its inverse would overflow the fp32 accumulators that it multiplies."""
    if abs(scale) < 2.0**-100:
        return {"scale": 1.0, "inverse": 1.0, "R_up": 0}
    return {"scale": scale, "inverse": 1.0 / scale, "R_up": R}


def precision_of(dtype: torch.dtype) -> str:
    """ "ieee" or "tf32", by ``torch.get_float32_matmul_precision()``. Means nothing for 16-bit operands."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
