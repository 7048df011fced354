"""The row norms that DoRA divides by, computed from W in every call.

    n = ‖W + s·B A‖ by rows          d = m / n

The norm is factored (arXiv:2603.22276), with nothing of W's size beside W:

    n² = ‖W‖² + rowsum((2s·W Aᵀ + s²·B (A Aᵀ)) ⊙ B)

Where B A cancels a row of W, the terms of this sum cancel too, and rounding may leave 0 or less. n² is therefore kept
at or above eps·‖W‖² (eps of the dtype it is summed in), so that d stays finite. Above that, n's relative error is about
eps·‖W‖² / n²: all digits are right unless B A takes away most of a row of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops import flops, registered
from lora_kernels.ops.direct import base_gemm
from lora_kernels.ops.sums import row_norm
from lora_kernels.ops.watched import watched

_WEIGHT_ROWS = 512
"""The number of rows of a 16-bit W that are converted to fp32 at a time. A W in fp32 or fp64 is read as a whole."""


def weight_norm(
    w: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor, weight_norm_sq: Tensor | None = None
) -> Tensor:
    """Return n = ‖W + scale·B A‖ by rows [N], rounded to the dtype of `magnitude`: the magnitude with which d = 1.

    A row of zeros has the dtype's smallest normal number, so that its d is 0 and not 0/0. `weight_norm_sq` is ‖W‖² by
    rows where the caller has it.
    """
    square = None if weight_norm_sq is None else weight_norm_sq.detach()
    norm_of = _run_norm
    if watched(w, w, a, b, square):
        flops.register()
        norm_of = _norm_op
    norm = norm_of(w, a.detach(), b.detach(), scale, square)
    return norm.to(magnitude.dtype).clamp_min(torch.finfo(magnitude.dtype).smallest_normal)


def ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return d = m / n for a `weight_norm` n, in fp32 at least."""
    wide = torch.promote_types(magnitude.dtype, torch.float32)
    return magnitude.to(wide) / norm.to(wide)


def _run_norm(w: Tensor, a: Tensor, b: Tensor, scale: float, weight_norm_sq: Tensor | None) -> Tensor:
    """Return n [N] in the widest dtype of W, A and fp32."""
    wide = torch.promote_types(torch.promote_types(w.dtype, a.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    square = w.new_empty(w.shape[0], dtype=wide) if weight_norm_sq is None else weight_norm_sq.to(wide)
    low = torch.empty_like(b, memory_format=torch.contiguous_format)
    step = w.shape[0] if w.dtype == wide else _WEIGHT_ROWS
    # MKL divides these products among its threads along K. This is not `fixed`, because every call enters it.
    in_order = w.is_cpu and torch.are_deterministic_algorithms_enabled()
    for n in range(0, w.shape[0], step):
        rows = slice(n, n + step)
        block = w[rows].to(wide)
        if in_order:
            low[rows] = base_gemm(block, a, None)
        else:
            torch.mm(block, a.t(), out=low[rows])
        if weight_norm_sq is None:
            square[rows] = row_norm(block).square_()
    if in_order:
        low.mul_(2 * scale).add_(base_gemm(b, base_gemm(a, a, None), None), alpha=scale * scale)
    else:
        low = torch.addmm(low, b, a @ a.t(), beta=2 * scale, alpha=scale * scale)
    norm_sq = (low * b).sum(1).add_(square)
    return torch.maximum(norm_sq, square * torch.finfo(wide).eps).sqrt_()


def _fake_norm(w, a, b, scale, weight_norm_sq):  # type: ignore
    return w.new_empty(w.shape[0], dtype=torch.promote_types(torch.promote_types(w.dtype, a.dtype), torch.float32))


registered.library.define("dora_norm(Tensor w, Tensor a, Tensor b, float scale, Tensor? weight_norm_sq) -> Tensor")
registered.library.impl("dora_norm", _run_norm, "CompositeExplicitAutograd")
torch.library.register_fake("lora_kernels::dora_norm", _fake_norm, lib=registered.library)
_norm_op = torch.ops.lora_kernels.dora_norm.default
