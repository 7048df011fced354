"""The row norms that DoRA divides by, computed from W in every call, dense or quantised.

    n = ‖W + s·B A‖ by rows          d = m / n

The norm is factored (arXiv:2603.22276), with nothing of W's size beside W:

    n² = ‖W‖² + rowsum((2s·W Aᵀ + s²·B (A Aᵀ)) ⊙ B)

On a CPU one native kernel reads W, or its codes, once (csrc/cpu/row_norm.cpp). Elsewhere, and for a W that it does not
take, torch operations do the same. A quantised W is decoded to fp32 a few rows at a time.

Where B A cancels a row of W, the terms of this sum cancel too, and rounding may leave 0 or less. n² is therefore kept
at or above eps·‖W‖² (eps of the dtype it is summed in), so that d stays finite. Above that, n's relative error is about
eps·‖W‖² / n²: all digits are right unless B A takes away most of a row of W.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops import flops, registered
from lora_kernels.ops.autograd import outlived
from lora_kernels.ops.direct import base_gemm
from lora_kernels.ops.sums import row_squares
from lora_kernels.ops.watched import watched
from lora_kernels.ops.weights import weight_parts, whole_weight
from lora_kernels.quant.weight import QuantizedWeight

_KERNEL = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of the native kernel."""

_WEIGHT_ROWS = 512
"""The number of rows of W that are converted, decoded or squared at a time. A dense W in fp32 or fp64 on a GPU is read
as a whole."""


def weight_norm(w: Tensor | QuantizedWeight, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """Return n = ‖W + scale·B A‖ by rows [N], rounded to the dtype of `magnitude`: the magnitude with which d = 1.

    A row of zeros has the dtype's smallest normal number, so that its d is 0 and not 0/0. n does not depend on the
    back-end, so that d stays 1 whichever of them serves the layer.
    """
    codes = w.codes if isinstance(w, QuantizedWeight) else w
    if watched(codes, codes, a, b, None) or outlived(codes, a, b):
        flops.register()  # an operator takes a tensor out of a wrapper that is dead
        codes, *last = weight_parts(w)
        norm = _norm_op(codes, a.detach(), b.detach(), scale, *last)
    else:
        norm = _norm(w, a.detach(), b.detach(), scale)
    return norm.to(magnitude.dtype).clamp_min(torch.finfo(magnitude.dtype).smallest_normal)


def ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return d = m / n for a `weight_norm` n, in fp32 at least."""
    wide = torch.promote_types(magnitude.dtype, torch.float32)
    return magnitude.to(wide) / norm.to(wide)


@functools.cache
def _native() -> Any:
    """Return the module of the CPU kernels, or None where they are not built."""
    try:
        from lora_kernels import _C
        from lora_kernels.backends.cpu import quant  # noqa: F401 - it tells _C the levels of nf4 and fp4
    except ImportError:
        return None
    return _C


def _norm(w: Tensor | QuantizedWeight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return n [N] in the widest dtype of W, A and fp32."""
    N, dense = w.shape[0], isinstance(w, Tensor)
    read = not isinstance(w, Tensor) or (w.dtype in _KERNEL and w.stride()[1] == 1)
    if read and w.is_cpu and a.dtype in _KERNEL and (native := _native()):
        norm = a.new_empty(N, dtype=torch.float32)
        native.row_norm(torch.get_num_threads(), w, a, b, scale, norm)
        return norm
    wide = torch.promote_types(torch.promote_types(w.dtype, a.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    square = a.new_empty(N)
    low = torch.empty_like(b, memory_format=torch.contiguous_format)
    step = N if dense and w.dtype == wide and not w.is_cpu else _WEIGHT_ROWS
    # MKL divides these products among its threads along K. This is not `fixed`, because every call enters it.
    in_order = w.is_cpu and torch.are_deterministic_algorithms_enabled()
    for n in range(0, N, step):
        rows = slice(n, n + step)
        block = w[rows].to(wide) if isinstance(w, Tensor) else w.rows(n, min(n + step, N), wide)
        if in_order:
            low[rows] = base_gemm(block, a, None)
        else:
            torch.mm(block, a.t(), out=low[rows])
        square[rows] = row_squares(block)
    if in_order:
        low.mul_(2 * scale).add_(base_gemm(b, base_gemm(a, a, None), None), alpha=scale * scale)
    else:
        low = torch.addmm(low, b, a @ a.t(), beta=2 * scale, alpha=scale * scale)
    norm_sq = (low * b).sum(1).add_(square)
    return torch.maximum(norm_sq, square * torch.finfo(wide).eps).sqrt_()


def _run_norm(w, a, b, scale, w_scales=None, w_format="dense", w_blocksize=0):  # type: ignore
    dtype = w.dtype if w_format == "dense" else torch.float32
    return _norm(whole_weight(w, w_scales, w_format, w_blocksize, dtype), a, b, scale)


def _fake_norm(w, a, b, scale, w_scales=None, w_format="dense", w_blocksize=0):  # type: ignore
    dtype = w.dtype if w_format == "dense" else torch.float32
    return a.new_empty(b.shape[0], dtype=torch.promote_types(torch.promote_types(dtype, a.dtype), torch.float32))


registered.library.define(f"dora_norm(Tensor w, Tensor a, Tensor b, float scale, {registered.QUANTISED}) -> Tensor")
registered.library.impl("dora_norm", _run_norm, "CompositeExplicitAutograd")
torch.library.register_fake("lora_kernels::dora_norm", _fake_norm, lib=registered.library)
_norm_op = torch.ops.lora_kernels.dora_norm.default
