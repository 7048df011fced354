"""The vendor's GEMM for the base, and small Triton kernels for the low-rank half. Not yet run on a GPU.

    forward     h = c · (keep ⊙ x) aᵀ                          one pass over x, in parts of K
                y₀ = bias + s · h bᵀ                            adds the parts and writes y₀
                y = y₀ + x wᵀ                                   ``addmm_``
    in fp16     y₁ = x wᵀ + bias, then y = y₁ + s · h bᵀ        since bias + s · h bᵀ may not fit where y does
    backward    g = s · dy b, db = s · dyᵀ h                    one pass over dy, and the sums of its parts
                dx₀ = c · keep ⊙ (g a), da = c · gᵀ(keep ⊙ x)   one pass over x, and the sums of its parts
                dx = dx₀ + dy w                                 ``addmm_``

Nothing waits for anything but the end of the launch before it, no memory outlives a call, and every sum is made of
parts that are added in a fixed order. So results have the same bits in every run on one device, and a call can be
captured in a CUDA graph and replayed.

A list of layers over one x is one set of launches: x is read from memory once in a forward and once in the low-rank
half of a backward, and dx₀ is written once. A list is served in pieces where it has more than three layers, where the
number of layers times the largest BLOCK_R is above `tiles.max_rank_of_list`, or where the layers are asked for
different gradients.

Operands may have any strides. Where the adapters are fp32 beside an x in 16 bits, h and g stay in fp32. They and the
gradients of a and b come from products of fp32, as in PEFT, in the precision of
``torch.get_float32_matmul_precision()``. A quantised w is dequantised by one more launch, for the length of the call; a
backward without dx skips it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.core.operands import (
    Adapter,
    Base,
    Call,
    Gradients,
    MaybeTensors,
    MultiResult,
    Needs,
    Results,
    Tensors,
)
from lora_kernels.core.rows import Rows
from lora_kernels.quant.weight import FORMATS, QuantizedWeight

try:
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        raise ImportError(f"Triton {triton.__version__} is too old")
    from lora_kernels.backends.composite import adapter_table, backward_pass, forward_pass, multi_pass
    from lora_kernels.backends.composite.adapter_table import Table
    from lora_kernels.backends.composite.experts import backward_experts, forward_experts
    from lora_kernels.backends.triton.device import Target, find_target
    from lora_kernels.backends.triton.launch import mask_launch
    from lora_kernels.backends.triton.quant import dense
except ImportError as error:
    raise ImportError(f"{error}; Triton 3.6 or later is needed: pip install 'triton>=3.6'") from error
from lora_kernels.backends.composite import tiles

__all__ = [
    "backward",
    "backward_experts",
    "backward_multi",
    "base_gemm",
    "forward",
    "forward_experts",
    "forward_multi",
    "keep_mask",
    "kernel_class",
    "name",
    "why_not",
]

name = "composite"

_DENSE = torch.contiguous_format
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(call: Call) -> list[str]:
    reasons = []
    if call.dtype not in _DTYPES:
        reasons.append(f"serves fp32, fp16 and bf16, not {call.dtype}")
    target = find_target(call.device)
    if target is None and call.device.type == "cuda":
        reasons.append("there is no usable GPU driver (torch.cuda.is_available() is False)")
    elif target is None:
        reasons.append(f"serves tensors on a CUDA or ROCm GPU, not on {call.device}")
    else:
        arch = target.gpu.arch
        if arch.startswith("sm_") and int(arch[3:]) < 75:
            reasons.append(f"serves NVIDIA GPUs from sm_75, not {arch}")
        elif arch == "sm_75" and call.dtype == torch.bfloat16:
            reasons.append("serves bf16 on NVIDIA GPUs from sm_80, not on sm_75, which has no instructions for it")
    if call.op.endswith("_experts") and call.w_format != "dense":
        reasons.append(f"serves experts whose weights are dense, not {call.w_format}")
    if call.op == "add_multi":
        reasons.append("adds many adapters to a base product of its own, not to a given y")
    if call.w_format not in ("dense", *FORMATS):
        reasons.append(f"serves a dense weight or one in {', '.join(FORMATS)}, not {call.w_format}")
    return reasons


def kernel_class(call: Call) -> str:
    """Return the rank block, the number of rows and, above 1, the number of layers that the kernels are compiled for,
    such as "r16 many" and "r16 many of 3". The kernels of many adapters, and of experts, serve all ranks and
    numbers of rows: "any"."""
    if call.op.endswith(("_multi", "_experts")):
        return "any"
    rank = f"r{tiles.block_r(call.R)}" + (" in chunks" if call.R > tiles.MAX_BLOCK_R else "")
    layers = f" of {call.layers}" if call.layers > 1 else ""
    return f"{rank} {tiles.rows_of(call.M)}{layers}"


def forward(x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], save_h: Sequence[bool]) -> Results:
    """Return (ys, hs)."""
    target = find_target(x.device)
    assert target is not None, "dispatch asks why_not first"
    M = x.shape[0]
    ys: list[Tensor] = []
    hs: list[Tensor | None] = []
    with target.guard():
        gemm_first = x.dtype == torch.float16
        for (w, bias), (_, b, *_), save in zip(bases, adapters, save_h, strict=True):
            N, R = b.shape
            ys.append(F.linear(x, _dense(w, x.dtype), bias) if gemm_first else x.new_empty(M, N))
            hs.append(b.new_empty(M, R) if save else None)
        for piece in _pieces(target, adapters):
            forward_pass.low_rank(target.gpu, x, bases[piece], adapters[piece], ys[piece], hs[piece], gemm_first)
        if not gemm_first:
            for y, (w, _) in zip(ys, bases, strict=True):
                y.addmm_(x, _dense(w, x.dtype).t())
    return ys, hs


def backward(
    dys: Tensors, x: Tensor | None, bases: Sequence[Base], adapters: Sequence[Adapter], hs: MaybeTensors, needs: Needs
) -> Gradients:
    """Return (dx, das, dbs)."""
    target = find_target(dys[0].device)
    assert target is not None, "dispatch asks why_not first"
    dx: Tensor | None = None
    das: list[Tensor | None] = []
    dbs: list[Tensor | None] = []
    with target.guard():
        for (a, b, *_), need_da, need_db in zip(adapters, needs.da, needs.db, strict=True):
            (R, K), N = a.shape, b.shape[0]
            das.append(a.new_empty(R, K) if need_da else None)
            dbs.append(b.new_empty(N, R) if need_db else None)
        for piece in _pieces(target, adapters, needs):
            if not (needs.dx or needs.da[piece.start] or needs.db[piece.start]):
                continue
            part = None
            if needs.dx:
                part = dys[0].new_empty(dys[0].shape[0], adapters[0].a.shape[1])
            operands = dys[piece], x, adapters[piece], hs[piece]
            backward_pass.low_rank(target.gpu, *operands, part, das[piece], dbs[piece])
            dx = part if dx is None or part is None else dx.add_(part)
        if dx is not None:
            for dy, (w, _) in zip(dys, bases, strict=True):
                dx.addmm_(dy, _dense(w, dy.dtype))
    return dx, das, dbs


def forward_multi(x: Tensor, base: Base, adapters: Sequence[Adapter | None], rows: Rows, save_h: bool) -> MultiResult:
    """Return (y, h)."""
    target = find_target(x.device)
    assert target is not None, "dispatch asks why_not first"
    with target.guard():
        y = F.linear(x, _dense(base.w, x.dtype), base.bias)
        table = adapter_table.table_of(target, adapters)
        h = _room(table, adapters, _counts(target, rows), x) if save_h else None
        multi_pass.low_rank(target.gpu, multi_pass.FORWARD, x, table, rows, h, y)
    return y, h


def backward_multi(
    dy: Tensor,
    x: Tensor | None,
    base: Base,
    adapters: Sequence[Adapter | None],
    rows: Rows,
    h: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Return (dx, das, dbs)."""
    target = find_target(dy.device)
    assert target is not None, "dispatch asks why_not first"
    das: list[Tensor | None] = []
    dbs: list[Tensor | None] = []
    with target.guard():
        counts = _counts(target, rows)
        for i, (adapter, need_da, need_db) in enumerate(zip(adapters, needs.da, needs.db, strict=True)):
            served = adapter is not None and (counts is None or counts[i] > 0)
            das.append(torch.empty_like(adapter.a, memory_format=_DENSE) if adapter and served and need_da else None)
            dbs.append(torch.empty_like(adapter.b, memory_format=_DENSE) if adapter and served and need_db else None)
        any_da, any_db = any(da is not None for da in das), any(db is not None for db in dbs)
        dx = dy @ _dense(base.w, dy.dtype) if needs.dx else None
        table = adapter_table.make(adapters, das, dbs)
        if any_da or dx is not None:
            g = _room(table, adapters, counts, dy) if any_da else None
            multi_pass.low_rank(target.gpu, multi_pass.BACKWARD, dy, table, rows, g, dx)
            if g is not None:
                assert x is not None
                multi_pass.gradients(target.gpu, "a", x, table, rows, g)
        if any_db:
            assert h is not None
            multi_pass.gradients(target.gpu, "b", dy, table, rows, h)
    return dx, das, dbs


def _counts(target: Target, rows: Rows) -> tuple[int, ...] | None:
    """Return the number of rows of each adapter, or None where the GPU would be waited for. It is None while a graph is
    captured too, because the graph may be replayed for another division of the rows."""
    return None if target.capturing() else rows.known_counts


def _room(
    table: Table, adapters: Sequence[Adapter | None], counts: tuple[int, ...] | None, like: Tensor
) -> Tensor:  # fmt: skip
    """Return memory for the h or g of all adapters. Where the number of their rows is not known here, it suffices for
    any."""
    facts = table.facts
    if counts is None:
        size = like.shape[0] * facts.rank
    else:
        size = sum(M * each.a.shape[0] for M, each in zip(counts, adapters, strict=True) if each is not None)
    return like.new_empty(size, dtype=facts.dtype)


def keep_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    target = find_target(x.device)
    assert target is not None, "dispatch asks why_not first"
    with target.guard():
        mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        mask_launch(mask, p, seed).run()
    return mask


def base_gemm(x: Tensor, w: Tensor | QuantizedWeight, bias: Tensor | None, transposed: bool = False) -> Tensor:
    target = find_target(x.device)
    assert target is not None, "dispatch asks why_not first"
    with target.guard():
        whole = _dense(w, x.dtype)
        return x @ whole if transposed else F.linear(x, whole, bias)


def _dense(w: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return w if isinstance(w, Tensor) else dense(w, dtype)


def _pieces(target: Target, adapters: Sequence[Adapter], needs: Needs | None = None) -> list[slice]:
    """Return the parts of a list of layers that one set of launches serves, in order. Within a part all layers are
    asked for the same of `needs`."""
    if len(adapters) == 1:
        return [slice(0, 1)]
    pieces = []
    limit = tiles.max_rank_of_list(target.gpu.arch, adapters[0].a.dtype.itemsize)
    start, largest = 0, 0
    for i, adapter in enumerate(adapters):
        larger, count = max(largest, tiles.block_r(adapter.a.shape[0])), i - start + 1
        alike = needs is None or (needs.da[i], needs.db[i]) == (needs.da[start], needs.db[start])
        fits = alike and count <= tiles.MAX_LAYERS and larger * count <= limit
        if count > 1 and not fits:
            pieces.append(slice(start, i))
            start, larger = i, tiles.block_r(adapter.a.shape[0])
        largest = larger
    return [*pieces, slice(start, len(adapters))]
