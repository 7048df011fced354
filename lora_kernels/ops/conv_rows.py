"""Convolutions that are linear layers of the rows of x: a 1×1 kernel, and patches that do not overlap.

    1×1        row = position, K = C                              y [B, ..., N] = x [B, ..., C] Wᵀ
    patches    row = patch, K = C·k·..., for kernel = stride      (the first layer of ViT, CLIP and Qwen-VL)

Then `lora_linear` computes the layer, with the back-ends, masks and saved tensors that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.conv_window import Window


def lies_by_rows(x: Tensor) -> bool:
    """Return whether the memory of x [B, C, ...] holds one position after the other with all its channels, as
    channels_last has it."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def rows_of(x: Tensor, kernel: Sequence[int], window: Window) -> Tensor | None:
    """Return x [B, C, ...] as rows [B, ..., K], whose product with W [N, K] is the convolution; None where it is no
    such product, or where convolving is the faster way.

    1×1 with a stride of 1 is such a product for an x that lies by rows, of which a view is returned. Otherwise the rows
    are a copy, of the positions that the stride reaches or of the patches.
    """
    pairs = list(zip(kernel, window.stride, x.shape[2:], strict=True))
    if window.groups != 1 or window.pads or any(window.padding) or any(size < k for k, _, size in pairs):
        return None
    if all(k == 1 for k in kernel):
        if any(s != 1 for s in window.stride):
            return _Every.apply(x, window.stride)  # type: ignore[no-any-return]
        rows = x.movedim(1, -1)
        return rows if rows.is_contiguous() else None
    if any(k not in (1, s) for k, s, _ in pairs) or any(d != 1 for d in window.dilation):
        return None
    n = len(kernel)
    for i, (k, s, size) in enumerate(pairs):
        if k != s:
            x = x[(slice(None),) * (2 + i) + (slice(None, None, s),)]
        elif size % k:
            x = x.narrow(2 + i, 0, size - size % k)
    for i, k in reversed(list(enumerate(kernel))):
        x = x.unflatten(2 + i, (-1, k))
    # x is [B, C, S, k, S, k, ...] now, and its rows are [B, S, S, ..., C, k, k, ...].
    return x.permute(0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2)).flatten(n + 1)


class _Every(torch.autograd.Function):
    """The positions of x [B, C, ...] that a stride reaches, as rows [B, ..., C]. Slices of x would give the same, but
    their backward makes a tensor of zeros for each dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: tuple[int, ...]) -> Tensor:
        """Return the rows, contiguous."""
        ctx.sizes, ctx.stride, ctx.by_rows = x.shape, stride, lies_by_rows(x)
        return x.movedim(1, -1)[_reached(stride)].contiguous()

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None]:
        """Return dx, which lies in memory as x does."""
        B, C, *S = ctx.sizes
        if ctx.by_rows:
            dx = drows.new_zeros(B, *S, C)
            dx[_reached(ctx.stride)] = drows
            return dx.movedim(-1, 1), None
        dx = drows.new_zeros(B, C, *S)
        dx.movedim(1, -1)[_reached(ctx.stride)] = drows
        return dx, None


def _reached(stride: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the index of the positions that a stride reaches, in a tensor [B, ..., C]."""
    return slice(None), *(slice(None, None, s) for s in stride)
