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

_LONG = 8
"""The width of a kernel from which copying the patches of a contiguous x takes less time than convolving saves."""


def lies_by_rows(x: Tensor) -> bool:
    """Return whether the memory of x [B, C, ...] holds one position after the other with all its channels, as
    channels_last has it."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def rows_of(x: Tensor, kernel: Sequence[int], window: Window, foldable: bool) -> Tensor | None:
    """Return x [B, C, ...] as rows [B, ..., K], whose product with W [N, K] is the convolution; None where it is no
    such product, or where convolving is the faster way. `foldable` says that one convolution would do.

    1×1 with a stride of 1 is such a product for an x that lies by rows, of which a view is returned. Otherwise the rows
    are a copy, of the positions that the stride reaches or of the patches. `as_matrix` gives W.
    """
    if window.groups != 1 or window.pads or any(window.padding):
        return None
    stride = window.stride
    if any(k not in (1, s) or size < k for k, s, size in zip(kernel, stride, x.shape[2:], strict=True)):
        return None
    if all(k == 1 for k in kernel):
        if all(s == 1 for s in stride):
            rows = x.movedim(1, -1)
            return rows if rows.is_contiguous() else None
    elif any(d != 1 for d in window.dilation) or (foldable and kernel[-1] < _LONG and not lies_by_rows(x)):
        return None
    return _Rows.apply(x, tuple(kernel), stride)  # type: ignore[no-any-return]


def as_matrix(w: Tensor, x: Tensor) -> Tensor:
    """Return the matrix [N, K] of a kernel w [N, C, k, ...], with the columns in the order of the rows of x."""
    return (w.movedim(1, -1) if lies_by_rows(x) else w).flatten(1)


class _Rows(torch.autograd.Function):
    """The rows of x as a contiguous copy. Views and a copy would give the same, but their backward would make several
    tensors of x's size, and dx would not lie in memory as x does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """Return the rows [B, ..., K]."""
        ctx.sizes, ctx.kernel, ctx.stride, ctx.by_rows = x.shape, kernel, stride, lies_by_rows(x)
        return _view(x, kernel, stride, ctx.by_rows).flatten(1 + len(kernel))

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
        """Return dx, which lies in memory as x does."""
        B, C, *S = ctx.sizes
        whole = all(k == s and size % k == 0 for k, s, size in zip(ctx.kernel, ctx.stride, S, strict=True))
        make = drows.new_empty if whole else drows.new_zeros
        dx = make(B, *S, C).movedim(-1, 1) if ctx.by_rows else make(B, C, *S)
        into = _view(dx, ctx.kernel, ctx.stride, ctx.by_rows)
        into.copy_(drows.reshape(into.shape))
        return dx, None, None


def _view(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], by_rows: bool) -> Tensor:
    """Return the view of x [B, C, ...] whose last dimensions are a row: [B, S, ..., C, k, ...], or [B, S, ..., k, ...,
    C] for an x that lies by rows, because a copy of it then takes long pieces of memory."""
    n = len(kernel)
    for i, (k, s) in enumerate(zip(kernel, stride, strict=True)):
        if k != s:
            x = x[(slice(None),) * (2 + i) + (slice(None, None, s),)]
        elif x.shape[2 + i] % k:
            x = x.narrow(2 + i, 0, x.shape[2 + i] // k * k)
    for i, k in reversed(list(enumerate(kernel))):
        x = x.unflatten(2 + i, (x.shape[2 + i] // k, k))
    positions, offsets = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)  # x is [B, C, S, k, S, k, ...] now
    return x.permute(0, *positions, *((*offsets, 1) if by_rows else (1, *offsets)))
