"""Hand-written kernels for Hopper (sm_90a): one launch forward, one launch backward. Not yet run on a GPU.

Each launch is persistent and warp-specialised: TMA loads, wgmma, and work items that blocks claim by an atomic ticket
(csrc/cuda/sm90). Blocks work in pairs that load w for each other where a rule, or ``python -m lora_kernels verify
--tune``, says so. Calls with M up to 64 and no dropout take a kernel that splits K and streams w once.

x, w and dy are read through tensor maps. A tensor whose last stride is not 1, or whose rows or base address are not
multiples of 16 bytes, is copied first. a and b are read with any row stride and alignment; where their rows are no
multiple of 16 bytes, the launch itself copies them. Adapters in fp32 are refused: the kernels keep h and g in x's
dtype, where h may overflow and gradients in fp32 would have errors of 16 bits.

The counters and scratch memory of a launch come from `backends.workspace`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.backends.cuda import launch
from lora_kernels.backends.cuda.launch import GradientBuffers
from lora_kernels.backends.each import backward_each, forward_each
from lora_kernels.core import built
from lora_kernels.core.operands import Adapter, Base, Call, Needs
from lora_kernels.plans import choose
from lora_kernels.plans.sm90 import Sm90Plan
from lora_kernels.plans.tiles import Case

name = "cuda"

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_RANK = 256
DECODE_ROWS = 64
"""Up to this many rows, a forward without dropout takes the kernel that splits K (csrc/cuda/sm90/launch.cu)."""


def why_not(call: Call) -> list[str]:
    """Return every reason why the kernels cannot serve the call; an empty list where they can."""
    reasons = []
    if call.op.endswith("_multi"):
        reasons.append("serves one adapter for all rows of x; the back-end composite serves many in one call")
    if call.op.endswith("_experts"):
        reasons.append("serves one layer for all rows of x; the back-end composite serves the experts of a layer")
    if call.device.type != "cuda":
        reasons.append(f"serves tensors on an NVIDIA GPU, not on {call.device}")
    elif not torch.cuda.is_available() or torch.version.hip is not None:
        reasons.append("there is no usable NVIDIA driver")
    elif (capability := torch.cuda.get_device_capability(call.device)) != (9, 0):
        reasons.append("serves Hopper (sm_90), not sm_{}{}".format(*capability))
    try:
        launch.extension()
    except ImportError as error:
        reasons.append(
            f"the extension lora_kernels._cuda is not there ({error}): "
            f"it is compiled where it is asked for, by nvcc 12.4 or later: {built.reinstall(cuda=True)}"
        )
    else:
        if not reasons and (fault := launch.driver_fault()):
            reasons.append(fault)
    if call.dtype not in _DTYPES:
        reasons.append(f"serves fp16 and bf16, not {call.dtype}")
    if call.adapter_dtype != call.dtype:
        reasons.append(
            f"serves adapters in x's dtype, not {call.adapter_dtype} beside {call.dtype}: it keeps h and g in 16 bits. "
            "triton and composite serve fp32 adapters"
        )
    for label, size in (("N", call.N), ("K", call.K)):
        if size % launch.MULTIPLE:
            reasons.append(f"{label} must be a multiple of {launch.MULTIPLE}, got {size}")
        if size * call.R >= 2**31:
            reasons.append(f"{label}·R must be below 2³¹, got {size * call.R}")
    if call.R > _MAX_RANK:
        reasons.append(f"serves ranks up to {_MAX_RANK}, got {call.R}")
    if call.M >= 2**31:
        reasons.append(f"serves fewer than 2³¹ rows, got {call.M}")
    if call.w_format != "dense":
        reasons.append(f"the kernels take a dense weight, not {call.w_format}")
    return reasons


def kernel_class(call: Call) -> str:
    """Return "decode" for the kernel that splits K, else "tickets"."""
    return "decode" if call.op == "forward" and call.M <= DECODE_ROWS and not call.dropout else "tickets"


def _forward(x: Tensor, base: Base, adapter: Adapter, save_h: bool) -> tuple[Tensor, Tensor | None]:
    M = x.shape[0]
    y = x.new_empty(M, base.w.shape[0])
    h = x.new_empty(M, adapter.a.shape[0]) if save_h else None
    if M > 0:
        launch.launch_forward(_plan("forward", M, base, adapter), x, base, adapter, y, h)
    return y, h


def _backward(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, h: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    a, b, M = adapter.a, adapter.b, dy.shape[0]
    need_dx, (need_da,), (need_db,) = needs
    dx = dy.new_empty(M, base.w.shape[1]) if need_dx else None
    da = (a.new_empty if M else a.new_zeros)(a.shape) if need_da else None
    db = (b.new_empty if M else b.new_zeros)(b.shape) if need_db else None
    if M > 0 and (need_dx or need_da or need_db):
        plan = _plan("backward", M, base, adapter)
        launch.launch_backward(plan, dy, x, base, adapter, h, GradientBuffers(dx, da, db))
    return dx, da, db


forward = functools.partial(forward_each, _forward)
backward = functools.partial(backward_each, _backward)


def keep_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return the dropout mask of x [M, K], K a multiple of 8, as 0 and 1 in x's dtype (fp16 or bf16)."""
    mask = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch.launch_keep_mask(mask, p, seed)
    return mask


def base_gemm(x: Tensor, w: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """Return x Wᵀ + bias [M, N], or x W [M, K] where `transposed`."""
    return x @ w if transposed else F.linear(x, w, bias)


def _plan(op: str, M: int, base: Base, adapter: Adapter) -> Sm90Plan:
    w, a = base.w, adapter.a
    N, K = w.shape
    return choose.sm90_plan(op, Case((w.dtype, a.dtype), M, N, K, a.shape[0], adapter.p > 0), w.device)
