"""Triton kernels for NVIDIA GPUs from sm_80, forward and backward in one launch each. Not yet run on a GPU.

The kernels are checked in Triton's interpreter, and every entry of the tables of plans is compiled ahead of time.

Where the adapters are fp32 beside an x in 16 bits, h and g are fp32, and the products with them, a and b are made in
fp32, in the precision of ``torch.get_float32_matmul_precision()``. The tiles are then those of fp32.

Operands may have any strides. Where x, w and dy are aligned, Hopper and Blackwell read them through tensor-map
descriptors.

A quantised w is dequantised within the product where that is cheaper, as it is for few rows (`plans.quant_tiles`).
Otherwise one more launch writes it in x's dtype, for the length of the call, and the kernels for a dense w follow. A
backward that does not need dx skips that launch.
"""

from __future__ import annotations

import functools

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
from lora_kernels.plans import choose, quant_tiles, tiles

name = "triton"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(call: Call) -> list[str]:
    reasons = []
    if call.op.endswith("_multi"):
        reasons.append("serves one adapter for all rows of x; the back-end composite serves many in one call")
    if call.op.endswith("_experts"):
        reasons.append("serves one layer for all rows of x; the back-end composite serves the experts of a layer")
    if call.dtype not in _DTYPES:
        reasons.append(f"serves fp32, fp16 and bf16, not {call.dtype}")
    target = find_target(call.device)
    if target is None and call.device.type == "cuda":
        reasons.append("there is no usable GPU driver (torch.cuda.is_available() is False)")
    elif target is None:
        reasons.append(f"serves tensors on an NVIDIA GPU, not on {call.device}")
    elif (arch := tiles.resolve(target.gpu.arch)) is None:
        reasons.append(f"serves NVIDIA GPUs from sm_80, not {target.gpu.arch}; the back-end composite serves others")
    elif torch.float32 in (call.dtype, call.adapter_dtype) and (arch, 4) not in tiles.TABLES:
        reasons.append(
            f"serves x and adapters in fp16 and bf16 on {target.gpu.arch}: Triton rounds products of fp32 there"
        )
    if call.w_format not in ("dense", *FORMATS):
        reasons.append(f"serves a dense weight or one in {', '.join(FORMATS)}, not {call.w_format}")
    return reasons


def kernel_class(call: Call) -> str:
    """Return the kind of plan: "tickets", or "redundant" with its BLOCK_M, and "within" if w is dequantised within the
    product."""
    target = find_target(call.device)
    assert target is not None, "dispatch asks why_not first"
    w_format = "" if call.w_format == "dense" else call.w_format
    case = tiles.Case((call.dtype, call.adapter_dtype), call.M, call.N, call.K, call.R, call.dropout, True, w_format)
    plan = choose.plan(call.op, case, target.gpu)
    kind = f"redundant {plan.tile.BLOCK_M}" if plan.redundant else "tickets"
    return f"{kind} within" if plan.within else kind


def _forward(x: Tensor, base: Base, adapter: Adapter, save_h: bool) -> tuple[Tensor, Tensor | None]:
    target = find_target(x.device)
    assert target is not None, "dispatch asks why_not first"
    M, N, R = x.shape[0], base.w.shape[0], adapter.a.shape[0]
    with target.guard():
        y = x.new_empty(M, N)
        h = adapter.a.new_empty(M, R)
        plan = _plan("forward", target, x, base.w, adapter)
        base = base._replace(w=quantised.as_planned(base.w, plan, x.dtype))
        launch.forward_launch(target, plan, x, base, adapter, launch.Outputs(y, h, save_h)).run()
    return y, h if save_h else None


def _backward(
    dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, h: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    a, b = adapter.a, adapter.b
    need_dx, (need_da,), (need_db,) = needs
    target = find_target(dy.device)
    assert target is not None, "dispatch asks why_not first"
    (M, N), (R, K) = dy.shape, a.shape
    with target.guard():
        plan = _plan("backward", target, dy, base.w, adapter)
        if need_dx:
            base = base._replace(w=quantised.as_planned(base.w, plan, dy.dtype))
        elif not plan.within:
            # The kernel does not read w here, but the argument needs a tensor of the right type.
            base = base._replace(w=dy)
        dx = dy.new_empty(M, K) if need_dx else None
        da = a.new_empty(R, K) if need_da else None
        db = b.new_empty(N, R) if need_db else None
        g = a.new_empty(M, R)
        out = launch.GradientBuffers(dx, da, db, g)
        launch.backward_launch(target, plan, dy, launch.Saved(x, h), base, adapter, out).run()
    return dx, da, db


forward = functools.partial(forward_each, _forward)
backward = functools.partial(backward_each, _backward)


def keep_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    target = find_target(x.device)
    assert target is not None, "dispatch asks why_not first"
    with target.guard():
        mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        launch.mask_launch(mask, p, seed).run()
    return mask


def base_gemm(x: Tensor, w: Tensor | QuantizedWeight, bias: Tensor | None, transposed: bool = False) -> Tensor:
    target = find_target(x.device)
    assert target is not None, "dispatch asks why_not first"
    with target.guard():
        whole = w if isinstance(w, Tensor) else quantised.dense(w, x.dtype)
        return x @ whole if transposed else F.linear(x, whole, bias)


def _plan(op: str, target: Target, rows: Tensor, w: Tensor | QuantizedWeight, adapter: Adapter) -> tiles.Plan:
    """Return the plan of a pass; `rows` is x or dy."""
    (R, K), N, w_format = adapter.a.shape, w.shape[0], ""
    if isinstance(w, QuantizedWeight):
        w_format = quant_tiles.w_format(w.format, w.nested is not None)
    dtypes = rows.dtype, adapter.a.dtype
    case = tiles.Case(dtypes, rows.shape[0], N, K, R, adapter.p > 0, launch.aligned(rows, w), w_format)
    return choose.plan(op, case, target.gpu)
