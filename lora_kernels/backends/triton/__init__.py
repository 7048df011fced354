"""Triton kernels: NVIDIA from sm_80 and AMD gfx942, forward and backward in one launch each. Not yet run on a GPU.

Checked in Triton's interpreter and by compiling every tile of the tables ahead of time; `lora_kernels.backends.triton.kernels` holds
the kernels.

Operands may have any strides. Where x, w and dy are aligned, Hopper and Blackwell read them through tensor-map
descriptors.

A quantised w is dequantised within the product where that is the cheaper way, as it is for few rows
(`kernels.quant_tiles`). Otherwise one more launch writes it in x's dtype, for the length of the call, and the kernels
for a dense w follow; a backward that does not need dx does without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.backends.each import backward_each, forward_each
from lora_kernels.core.operands import Adapter, Base, Call, Needs
from lora_kernels.quant.weight import FORMATS, QuantizedWeight

try:
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        raise ImportError(f"Triton {triton.__version__} is too old")
    from lora_kernels.backends.triton import launch
    from lora_kernels.backends.triton import quant as quantised
    from lora_kernels.backends.triton.device import Target, find_target
except ImportError as error:
    raise ImportError(f"{error}; Triton 3.6 or later is needed: pip install 'triton>=3.6'") from error
from lora_kernels.plans import quant_tiles, tiles

name = "triton"

EVIDENCE: frozenset[str] = frozenset()
"""The architectures for which benchmarks/results holds a run."""

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
    elif tiles.resolve(target.arch) is None:
        reasons.append(f"serves NVIDIA GPUs from sm_80 and AMD gfx942, not {target.arch}")
    if call.w_format not in ("dense", *FORMATS):
        reasons.append(f"serves a dense weight or one in {', '.join(FORMATS)}, not {call.w_format}")
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
    target = find_target(x.device)
    assert target is not None, "dispatch asks why_not first"
    M, N, R = x.shape[0], w.shape[0], a.shape[0]
    with target.guard():
        y = torch.empty(M, N, dtype=x.dtype, device=x.device)
        h = torch.empty(M, R, dtype=x.dtype, device=x.device)
        plan = _plan("forward", target, x, w, a, R, p)
        w = quantised.as_planned(w, plan, x.dtype)
        launch.forward_launch(target, plan, x, w, a, b, bias, y, h, scale, p, seed, save_h).run()
    return y, h if save_h else None


def _backward(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, h: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    w, (a, b, scale, p, seed) = base.w, adapter
    need_dx, (need_da,), (need_db,) = needs
    target = find_target(dy.device)
    assert target is not None, "dispatch asks why_not first"
    (M, N), (R, K) = dy.shape, a.shape
    with target.guard():
        plan = _plan("backward", target, dy, w, a, R, p)
        if need_dx:
            w = quantised.as_planned(w, plan, dy.dtype)
        elif not plan.within:
            w = dy  # nobody reads w, but the kernel has an argument for it
        dx = torch.empty(M, K, dtype=dy.dtype, device=dy.device) if need_dx else None
        da = torch.empty(R, K, dtype=a.dtype, device=a.device) if need_da else None
        db = torch.empty(N, R, dtype=b.dtype, device=b.device) if need_db else None
        g = torch.empty(M, R, dtype=dy.dtype, device=dy.device)
        launch.backward_launch(target, plan, dy, x, w, a, b, h, dx, da, db, g, scale, p, seed).run()
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


def _plan(
    op: str, target: Target, rows: Tensor, w: Tensor | QuantizedWeight, a: Tensor, R: int, p: float
) -> tiles.Plan:
    """By the tables. `rows` is x or dy."""
    M, (N, K) = rows.shape[0], w.shape
    case = tiles.Case(
        target.arch, rows.element_size(), M, N, K, R, p > 0, launch.aligned(rows, w),
        target.multiprocessors, target.name, (rows.dtype, a.dtype),
    )  # fmt: skip
    if isinstance(w, QuantizedWeight):
        return quant_tiles.plan(op, case._replace(w_format=quant_tiles.w_format(w.format, w.nested is not None)))
    return tiles.plan(op, case)
