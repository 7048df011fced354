"""The equation of a convolution with LoRA in plain torch operations, for the calls that an autograd Function cannot
serve: see `lora_kernels.ops.plain`, whose rules hold here too.

    y = x ∗ W + bias + s·B (x̂ ∗ A)                                        ∗ convolves; B is a 1×1 kernel
    DoRA:  y = x ∗ W + bias + (d - 1) ⊙ (x̂ ∗ W) + d ⊙ s·B (x̂ ∗ A)        d = m / ‖W + s·B A‖ by output channels
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from lora_kernels.core import dropout
from lora_kernels.core.operands import Layer
from lora_kernels.ops import check, plain
from lora_kernels.ops.autograd import as_dtype, no_autocast
from lora_kernels.ops.conv_rows import lies_by_rows
from lora_kernels.ops.conv_window import Window
from lora_kernels.ops.dora_norm import ratio

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def serves(x: Tensor, layer: Layer, backend: str | None) -> bool:
    """Return whether `lora_conv` below serves a call: while torch.jit.trace or torch.export records, in a transform of
    torch.func, with tangents of forward-mode AD, for an x that is not dense, and for a subclass of Tensor that knows
    torch's operators only. Raises ValueError for a back-end that is named beside such a call."""
    dense = x.layout is torch.strided and not x.is_nested
    unusual = (
        not dense
        or torch._C._are_functorch_transforms_active()
        or plain.is_tracing()
        or plain.is_exporting()
        or (type(x) not in (Tensor, Parameter) and plain._dispatches(x))
        or (forward_ad._current_level >= 0 and plain.has_tangent(x, layer))
    )
    if unusual and backend is not None:
        raise ValueError(
            f"backend={backend!r} does not go with torch.jit.trace, torch.export, the transforms of torch.func, "
            "forward-mode AD, or an x that is no dense Tensor. With backend=None lora_conv computes such calls by "
            "plain torch operations, with the same results but for the bits of dropout"
        )
    return unusual


def lora_conv(x: Tensor, layer: Layer, magnitude: Tensor | None, window: Window) -> Tensor:
    """Return y of x [B, C, ...]."""
    w, a, b, scale, bias, p, seed = layer
    assert isinstance(w, Tensor), "a convolution has no quantised weight"
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {p}")
    if p > 0 and seed is not None and (plain.is_tracing() or plain.is_exporting()):
        raise ValueError("a call that is recorded draws a new mask in each run, and a seed gives one: leave seed away")
    scale, b = check.scale(scale, b)
    x_hat = _dropout(x, p, seed)
    y = convolve(window.padded(x), w, bias, window, window.groups)
    low = low_rank(x_hat, a, b, scale, 0.0, window)
    if magnitude is None:
        return as_dtype(y + low, y.dtype)
    d = _ratio(w, a, b, scale, magnitude, window.groups)
    u = y if p == 0 else convolve(window.padded(x_hat), w, None, window, window.groups)
    if p == 0 and bias is not None:
        u = u - bias.view(-1, *(1,) * (y.dim() - 2))
    return as_dtype(y + (d - 1) * u + d * low, y.dtype)


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, p: float, window: Window) -> Tensor:
    """Return scale·B (x̂ ∗ A), in the dtype of A."""
    x = window.padded(as_dtype(_dropout(x, p, None), a.dtype))
    h = convolve(x, a, None, window, 1 if a.shape[1] == x.shape[1] else window.groups)
    return convolve(h, b, None, window.pointwise(), window.groups) * scale


def convolve(x: Tensor, w: Tensor, bias: Tensor | None, window: Window, groups: int) -> Tensor:
    """Return the convolution of a padded x with w, by the function of torch that autocast, tracers and transforms
    know."""
    function = _CONVOLUTIONS[len(window.stride) - 1]
    return function(x, w, bias, window.stride, window.padding, window.dilation, groups)


def _dropout(x: Tensor, p: float, seed: Tensor | int | None) -> Tensor:
    """Return x̂, with torch's dropout where no seed is given, and else with the mask of `conv_mask`."""
    if p == 0:
        return x
    if seed is None:
        return F.dropout(x, p)
    seed = check.seed(seed, x.device)
    if lies_by_rows(x):
        rows = x.movedim(1, -1)
        return dropout.dropout(rows.reshape(-1, x.shape[1]), p, seed).view(rows.shape).movedim(-1, 1)
    return dropout.dropout(x.reshape(math.prod(x.shape[:2]), -1), p, seed).view(x.shape)


def _ratio(w: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor, groups: int) -> Tensor:
    """Return d in the shape of `magnitude`."""
    with no_autocast(w.device.type):
        wide = torch.promote_types(torch.promote_types(w.dtype, a.dtype), torch.float32)
        w, a, b = (t.detach().to(wide).reshape(groups, t.shape[0] // groups, -1) for t in (w, a, b))
        norm = torch.linalg.vector_norm(torch.baddbmm(w, b, a, alpha=scale), dim=2).view(magnitude.shape)
        norm = norm.to(magnitude.dtype)
        return ratio(magnitude, norm.clamp_min(torch.finfo(magnitude.dtype).smallest_normal))
