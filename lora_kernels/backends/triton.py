"""Triton kernels: NVIDIA from sm_80 and AMD gfx942, forward and backward in one launch each. Not yet run on a GPU.

Checked in Triton's interpreter and by compiling every tile of the tables ahead of time; `lora_kernels.kernels` holds
the kernels.

Operands may have any strides. Where x, w and dy are aligned, Hopper and Blackwell read them through tensor-map
descriptors.

A quantised w is dequantised within the forward where few rows make that the cheaper way (`kernels.quant_tiles`).
Otherwise, and in a backward that needs dx, one more launch writes it in x's dtype, for the length of the call, and the
kernels for a dense w follow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.backends import Call
from lora_kernels.quant import FORMATS, QuantizedWeight

try:
    from lora_kernels.backends import _triton_launch as launch
    from lora_kernels.backends import _triton_quant as quantised
except ImportError as error:
    raise ImportError(f"{error}; Triton 3.6 or later is needed: pip install 'triton>=3.6'") from error
from lora_kernels.kernels import quant_tiles, tiles

name = "triton"

EVIDENCE: frozenset[str] = frozenset()
"""The architectures for which bench/results holds a run."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(call: Call) -> list[str]:
    reasons = []
    if call.dtype not in _DTYPES:
        reasons.append(f"serves fp32, fp16 and bf16, not {call.dtype}")
    target = launch.find_target(call.device)
    if target is None:
        reasons.append(f"serves tensors on a CUDA or ROCm GPU, not on {call.device}")
    elif tiles.resolve(target.arch) is None:
        reasons.append(f"serves NVIDIA GPUs from sm_80 and AMD gfx942, not {target.arch}")
    if call.w_format not in ("dense", *FORMATS):
        reasons.append(f"serves a dense weight or one in {', '.join(FORMATS)}, not {call.w_format}")
    return reasons


def forward(
    x: Tensor,
    w: Tensor | QuantizedWeight,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    save_h: bool,
) -> tuple[Tensor, Tensor | None]:
    target = launch.find_target(x.device)
    assert target is not None, "dispatch asks why_not first"
    (M, K), N, R = x.shape, w.shape[0], a.shape[0]
    with target.guard():
        y = torch.empty(M, N, dtype=x.dtype, device=x.device)
        h = torch.empty(M, R, dtype=x.dtype, device=x.device)
        if isinstance(w, QuantizedWeight):
            within = quant_tiles.forward_plan(target.arch, x.element_size(), M, N, K, R, target.multiprocessors)
            if within is not None:
                quantised.forward_launch(target, within, x, w, a, b, bias, y, h, scale, p, seed, save_h).run()
                return y, h if save_h else None
            w = quantised.dense(w, x.dtype)
        plan = tiles.forward_plan(
            target.arch,
            x.element_size(),
            M,
            N,
            K,
            R,
            p > 0,
            launch.describable(x, w),
            target.multiprocessors,
            target.name,
            (x.dtype, a.dtype),
        )
        launch.forward_launch(target, plan, x, w, a, b, bias, y, h, scale, p, seed, save_h).run()
    return y, h if save_h else None


def backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | QuantizedWeight,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    target = launch.find_target(dy.device)
    assert target is not None, "dispatch asks why_not first"
    (M, N), (R, K) = dy.shape, a.shape
    with target.guard():
        if isinstance(w, QuantizedWeight):
            w = quantised.dense(w, dy.dtype, fill=need_dx)
        plan = tiles.backward_plan(
            target.arch,
            dy.element_size(),
            M,
            N,
            K,
            R,
            p > 0,
            launch.describable(dy, w),
            target.multiprocessors,
            target.name,
            (dy.dtype, a.dtype),
        )
        dx = torch.empty(M, K, dtype=dy.dtype, device=dy.device) if need_dx else None
        da = torch.empty(R, K, dtype=a.dtype, device=a.device) if need_da else None
        db = torch.empty(N, R, dtype=b.dtype, device=b.device) if need_db else None
        g = torch.empty(M, R, dtype=dy.dtype, device=dy.device)
        launch.backward_launch(target, plan, dy, x, w, a, b, h, dx, da, db, g, scale, p, seed).run()
    return dx, da, db
