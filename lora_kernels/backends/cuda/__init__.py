"""Hand-written kernels for Hopper (sm_90a): one launch forward, one launch backward. Not yet run on a GPU.

Each launch is persistent and warp-specialised: TMA loads, wgmma, work items claimed by an atomic ticket
(csrc/cuda/sm90), in pairs of blocks that load w for each other where a rule or ``python -m lora_kernels tune --backend
cuda`` says so. M up to 64 without dropout takes a kernel that splits K and streams w once.

x, w and dy are read through tensor maps: where one has no unit last stride, or rows or a base address that are no
multiple of 16 bytes, a contiguous copy of it is made first. a and b are read with any row stride and alignment; where
they are fp32, or their rows are no multiple of 16 bytes, the launch itself converts them to x's dtype.

One workspace for every device and stream: counters, which every launch leaves zero, and scratch memory. A launch
captured into a CUDA graph uses memory of that graph instead, so that graphs can be replayed on any stream beside
anything else.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.backends.each import backward_each, forward_each
from lora_kernels.core import dropout as random
from lora_kernels.core.operands import Adapter, Base, Call, Needs
from lora_kernels.plans import choose
from lora_kernels.plans.sm90 import Sm90Plan
from lora_kernels.plans.tiles import Case

name = "cuda"

EVIDENCE: frozenset[str] = frozenset()
"""The architectures for which benchmarks/results holds a run."""

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_RANK = 256
_MULTIPLE = 8
"""Elements of 16 bits to 16 bytes: what TMA wants of rows and addresses."""


def why_not(call: Call) -> list[str]:
    reasons = []
    if call.device.type != "cuda":
        reasons.append(f"serves tensors on an NVIDIA GPU, not on {call.device}")
    elif not torch.cuda.is_available() or torch.version.hip is not None:
        reasons.append("there is no usable NVIDIA driver")
    elif (capability := torch.cuda.get_device_capability(call.device)) != (9, 0):
        reasons.append("serves Hopper (sm_90), not sm_{}{}".format(*capability))
    try:
        _extension()
    except ImportError as error:
        reasons.append(
            f"the extension lora_kernels._cuda is not there ({error}): "
            "install from source with LORA_KERNELS_CUDA=1 and nvcc 13.0 or later"
        )
    if call.dtype not in _DTYPES:
        reasons.append(f"serves fp16 and bf16, not {call.dtype}")
    if call.adapter_dtype not in (call.dtype, torch.float32):
        reasons.append(f"serves adapters in x's dtype or in fp32, not {call.adapter_dtype}")
    for label, size in (("N", call.N), ("K", call.K)):
        if size % _MULTIPLE:
            reasons.append(f"{label} must be a multiple of {_MULTIPLE}, got {size}")
        if size * call.R >= 2**31:
            reasons.append(f"{label}·R must be below 2³¹, got {size * call.R}")
    if call.R > _MAX_RANK:
        reasons.append(f"serves ranks up to {_MAX_RANK}, got {call.R}")
    if call.M >= 2**31:
        reasons.append(f"serves fewer than 2³¹ rows, got {call.M}")
    if call.w_format != "dense":
        reasons.append(f"the kernels take a dense weight, not {call.w_format}")
    return reasons


def forward(
    x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], save_h: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    return forward_each(_forward, x, bases, adapters, save_h)


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    bases: Sequence[Base],
    adapters: Sequence[Adapter],
    hs: Sequence[Tensor | None],
    needs: Needs,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    return backward_each(_backward, dys, x, bases, adapters, hs, needs)


def _forward(x: Tensor, base: Base, adapter: Adapter, save_h: bool) -> tuple[Tensor, Tensor | None]:
    (w, bias), (a, b, scale, p, seed) = base, adapter
    assert isinstance(w, Tensor), "dispatch asks why_not first"
    y = x.new_empty(x.shape[0], w.shape[0])
    h = x.new_empty(x.shape[0], a.shape[0]) if save_h else None
    if x.shape[0] > 0:
        tiling = _tiling("forward", x.shape[0], w, a, p)
        launch_forward(tiling, x, w, a, b, bias, scale, p, seed, y, h)
    return y, h


def _backward(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, h: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    w, (a, b, scale, p, seed) = base.w, adapter
    need_dx, (need_da,), (need_db,) = needs
    assert isinstance(w, Tensor), "dispatch asks why_not first"
    M, empty = dy.shape[0], dy.shape[0] == 0
    dx = dy.new_empty(M, w.shape[1]) if need_dx else None
    da = (a.new_zeros if empty else a.new_empty)(a.shape) if need_da else None
    db = (b.new_zeros if empty else b.new_empty)(b.shape) if need_db else None
    if not empty and (need_dx or need_da or need_db):
        tiling = _tiling("backward", M, w, a, p)
        launch_backward(tiling, dy, x, w, a, b, h, scale, p, seed, dx, da, db)
    return dx, da, db


def keep_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """By the backward kernel: with W = 0, a = 1 and g = 1 its dx is c·keep."""
    (M, K), N = x.shape, 8
    dy, w, a, b = x.new_ones(M, N), x.new_zeros(N, K), x.new_ones(1, K), x.new_ones(N, 1)
    dx, _, _ = backward([dy], None, [Base(w)], [Adapter(a, b, 1 / N, p, seed)], [None], Needs(True, (False,), (False,)))
    assert dx is not None
    return dx.sign_()


def base_gemm(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def launch_forward(
    tiling: Sm90Plan,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    y: Tensor,
    h: Tensor | None,
) -> None:
    """`forward` of one row at least, by a tiling, into contiguous y [M,N] and h [M,R] (None: not wanted)."""
    x, w, a, b = _addressable(x), _addressable(w), _unit_stride(a), _unit_stride(b)
    bias = None if bias is None else _in_pairs(bias)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        call = _extension().Sm90Forward(**_operands(x.shape[0], x, w, a, b, scale, p, seed, stream, tiling))
        call.results(bias=_address(bias), y=_address(y), h=_address(h))
        memory = workspace(x.device, stream, *call.workspace())
        call.launch(_address(memory.counters), _address(memory.scratch))


def launch_backward(
    tiling: Sm90Plan,
    dy: Tensor,
    x: Tensor | None,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
) -> None:
    """`backward` of one row at least, by a tiling, into those of contiguous dx [M,K], da [R,K] and db [N,R] that are
    wanted, one at least."""
    dy, w, a, b = _addressable(dy), _addressable(w), _unit_stride(a), _unit_stride(b)
    x = _addressable(x) if da is not None and x is not None else None
    h = h.contiguous() if db is not None and h is not None else None
    with torch.cuda.device(dy.device):
        stream = torch.cuda.current_stream().cuda_stream
        call = _extension().Sm90Backward(**_operands(dy.shape[0], x, w, a, b, scale, p, seed, stream, tiling))
        call.results(
            dy=_address(dy), lddy=_row_stride(dy), h=_address(h), dx=_address(dx), da=_address(da), db=_address(db)
        )
        memory = workspace(dy.device, stream, *call.workspace())
        call.launch(_address(memory.counters), _address(memory.scratch))


def _tiling(op: str, M: int, w: Tensor, a: Tensor, p: float) -> Sm90Plan:
    (N, K), R = w.shape, a.shape[0]
    case = Case((w.dtype, a.dtype), M, N, K, R, p > 0)
    return choose.sm90_plan(op, case, _device_name(w.device))


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _extension() -> ModuleType:
    return importlib.import_module("lora_kernels._cuda")


def _operands(
    M: int,
    x: Tensor | None,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    stream: int,
    tiling: Sm90Plan,
) -> dict[str, object]:
    """What both passes take, as the extension names it."""
    return {
        "device": w.device.index,
        "M": M,
        "N": w.shape[0],
        "K": w.shape[1],
        "R": a.shape[0],
        "bf16": w.dtype == torch.bfloat16,
        "adapters_fp32": a.dtype == torch.float32,
        "x": _address(x),
        "w": _address(w),
        "a": _address(a),
        "b": _address(b),
        "ldx": 0 if x is None else _row_stride(x),
        "ldw": _row_stride(w),
        "lda": _row_stride(a),
        "ldb": _row_stride(b),
        "scale": scale,
        "seed": _address(seed),
        "threshold": random.threshold(p),
        "rescale": random.rescale(p),
        "stream": stream,
        **tiling._asdict(),
    }


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _row_stride(t: Tensor) -> int:
    """In elements. The stride of a single row means nothing, and may be anything."""
    return t.stride(0) if t.shape[0] > 1 else t.shape[1]


def _unit_stride(t: Tensor) -> Tensor:
    """a or b, as a copy where neighbours in a row are not neighbours in memory."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _addressable(t: Tensor) -> Tensor:
    """x, w or dy, as a contiguous copy where a tensor map cannot describe it."""
    row_stride = _row_stride(t)
    aligned = row_stride % _MULTIPLE == 0 and row_stride >= t.shape[1] and t.data_ptr() % 16 == 0
    return t if t.stride(1) == 1 and aligned else t.clone(memory_format=torch.contiguous_format)


def _in_pairs(bias: Tensor) -> Tensor:
    """bias, as a copy where its elements cannot be read two at a time."""
    together = bias.is_contiguous() and bias.data_ptr() % 4 == 0
    return bias if together else bias.clone(memory_format=torch.contiguous_format)


class Workspace(NamedTuple):
    """What launches on a stream share. `capture`: the number of the graph that is being captured; 0: none."""

    capture: int
    counters: Tensor
    scratch: Tensor


_workspaces: dict[tuple[torch.device, int, bool], Workspace] = {}


def workspace(device: torch.device, stream: int, counters: int, scratch: int) -> Workspace:
    """Memory for a launch on `stream`, the current one: what the last launch had, where it is large enough.

    Launches on a stream follow each other, so they can share. What is outgrown goes back to torch's allocator, which
    hands it on only to later work on this stream. While the stream is being captured, the memory is the graph's own,
    zeroed in the graph, and it is kept no longer than to the next capture.
    """
    capture = _extension().capture_id(stream)
    key = (device, stream, capture != 0)
    have = _workspaces.get(key)
    if have is None or have.capture != capture:
        have = Workspace(capture, _zeros(counters, device), _scratch(scratch, device))
    if have.counters.numel() < counters:
        have = have._replace(counters=_zeros(counters, device))
    if have.scratch.numel() < scratch:
        have = have._replace(scratch=_scratch(scratch, device))
    _workspaces[key] = have
    return have


def _zeros(counters: int, device: torch.device) -> Tensor:
    return torch.zeros(max(1024, 1 << (counters - 1).bit_length()), dtype=torch.int32, device=device)


def _scratch(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)
