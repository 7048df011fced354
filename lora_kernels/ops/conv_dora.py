"""DoRA over a convolution (Liu et al., 2024, arXiv:2402.09353), from the parts of LoRA's.

    n = ‖W + s·B A‖ by output channels, a constant for autograd          d = m / n
    p = 0:  z = x ∗ W + s·B h                                            y = d ⊙ z + bias
            in 16 bits with fp32 A and B: u = x ∗ W + bias               y = d ⊙ u + (1 - d) ⊙ bias + s·(d ⊙ B) h
    p > 0:  u = x̂ ∗ W                                                    y = x ∗ W + bias + s·(d ⊙ B) h + (d - 1) ⊙ u

z or u is saved for m's gradient. In 16 bits z includes the bias, and (1 - d) ⊙ bias is added in its place, as in
`lora_kernels.ops.dora`: what is elementwise is computed in fp32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops import check
from lora_kernels.ops.autograd import apply, as_dtype
from lora_kernels.ops.conv_function import How, LoRAConvFunction, MaskedConvFunction
from lora_kernels.ops.dora_norm import ratio, weight_norm


def magnitude_of(w: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor, groups: int) -> Tensor:
    """Return ‖W + scale·B A‖ by output channels, in the shape and dtype of `magnitude`: the m with which d = 1. A is in
    `groups` as W is."""
    norms = [
        weight_norm(w_g.flatten(1), a_g.flatten(1), b_g.flatten(1), scale, magnitude)
        for w_g, a_g, b_g in zip(w.chunk(groups), a.chunk(groups), b.chunk(groups), strict=True)
    ]
    return torch.cat(norms).view(magnitude.shape)


def dora_conv(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    seed: Tensor | None,
    how: How,
) -> Tensor:
    """Return y of a padded x [B, C, ...]."""
    window, p = how.window, how.p
    d = ratio(magnitude, magnitude_of(w, a, b, how.scale, magnitude, window.groups))
    of_rows = d.view(-1, *(1,) * (w.dim() - 1))
    halves = x.dtype in check.HALVES
    rest = None if bias is None else bias.view(d.shape)
    if p > 0:
        y = apply(LoRAConvFunction, x, w, a, (b * of_rows).to(b.dtype), bias, seed, how)
        u = apply(MaskedConvFunction, x, w, seed, how)
        return as_dtype(y + u * as_dtype(d - 1, u.dtype if not halves else d.dtype), x.dtype)
    if not halves:
        z = apply(LoRAConvFunction, x, w, a, b, None, seed, how)
        z = z * as_dtype(d, z.dtype)
        return z if rest is None else z + rest
    if a.dtype == x.dtype:
        y = apply(LoRAConvFunction, x, w, a, b, bias, seed, how) * d
    else:
        low = apply(LoRAConvFunction, x, None, a, (b * of_rows).to(b.dtype), None, seed, how)
        y = window.convolve(x, as_dtype(w, x.dtype), bias) * d + low
    return (y if rest is None else y + (1 - d) * rest).to(x.dtype)
