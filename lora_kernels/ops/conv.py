"""`lora_conv`: a convolution with LoRA in one, two or three dimensions.

lora_conv → plain torch operations, where no autograd Function can serve the call (conv_plain)
          → lora_linear or dora_linear of rows: 1×1 kernels and patches           (conv_rows)
          → LoRAConvFunction, made of torch's convolutions                        (conv_function, conv_dora)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.backends import dispatch
from lora_kernels.core.dropout import draw_seed
from lora_kernels.core.operands import Layer
from lora_kernels.ops import check, conv_check, conv_plain, plain
from lora_kernels.ops.autograd import apply, as_dtype, autocast_of, device_type, no_autocast
from lora_kernels.ops.conv_dora import dora_conv
from lora_kernels.ops.conv_function import How, LoRAConvFunction
from lora_kernels.ops.conv_rows import lies_by_rows, rows_of
from lora_kernels.ops.conv_window import Sizes, Window, window
from lora_kernels.ops.dora import dora_linear
from lora_kernels.ops.linear import lora_linear


def lora_conv(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: str | Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    magnitude: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return y = x ∗ W + bias + scale·B (x̂ ∗ A) with x̂ = dropout(x), where ∗ convolves with the same stride, padding
    and dilation both times and B is a 1×1 kernel. There are gradients for x, A, B, bias and m. W is frozen.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685). With `magnitude` it is
    DoRA (Liu et al., 2024, arXiv:2402.09353): y = x ∗ W + bias + (d - 1) ⊙ (x̂ ∗ W) + d ⊙ scale·B (x̂ ∗ A) with
    d = m / ‖W + scale·B A‖ by output channels, a norm that is a constant for autograd.

    Args:
        x: [B, C, ...] or [C, ...], with one, two or three dimensions at the end; fp64, fp32, fp16 or bf16.
        weight: W [N, C/groups, k, ...], in x's dtype; must not require a gradient.
        lora_a: A [R, C, k, ...], in x's dtype, or fp32 beside an fp16 or bf16 x. With groups it sees all channels, as
            PEFT's does, or in groups of its own, [R, C/groups, k, ...]. R is a multiple of groups.
        lora_b: B [N, R/groups, 1, ...], in A's dtype, in the groups of W.
        scale: s, as for `lora_linear`.
        bias: [N], in x's dtype.
        stride, padding, dilation, groups, padding_mode: as for ``nn.Conv2d``. They hold for W and A alike.
        dropout_p: p in [0, 1): the probability with which an element of x is dropped in the low-rank branch, before x
            is padded.
        seed: the seed of the mask, as for `lora_linear`. The mask is a function of (seed, row, column) of x as it lies
            in memory: [B·C, S] for a contiguous x, [B·S, C] for one in channels_last, where S is the number of
            positions. Where `lora_linear` serves the call it is the mask of its rows.
        magnitude: m [1, N, 1, ...], in A's dtype or fp32. With groups, A must be in groups too.
        backend: the name of a back-end, which draws the mask, and computes the call where `lora_linear` serves it. All
            other convolutions are torch's.

    Which way a call takes:
        * A 1×1 kernel without padding is `lora_linear` of the positions, where x lies in channels_last or the stride
          is above 1. So are patches, where the kernel is the stride and there is neither padding nor dilation.
        * In fp32 and fp64 without dropout, from 1,024 positions of y on, one convolution with W + s·B A computes y, and
          another one dx. W + s·B A is not saved.
        * Every other call convolves with W and with A, and adds s·B h to y in place.

    Under autocast every operand is converted to its dtype, but fp32 A and B stay as they are where `lora_linear` serves
    the call.

    Returns:
        y [B, N, ...] or [N, ...], in x's dtype. In memory it lies as torch's convolution has it, except that patches
        give it in channels_last.

    Raises:
        TypeError: for dtypes other than the above, or a `seed` or `scale` that is no number.
        ValueError: for shapes that do not fit together, operands on different devices, a weight that requires a
            gradient, p outside [0, 1), a scale that is not finite, DoRA over groups with an A that sees all channels,
            an unknown back-end, or one that is named where plain torch operations serve the call.
        RuntimeError: from autograd, on double backward.
    """
    if backend is not None and backend not in dispatch.BACKENDS:
        raise ValueError(f"there is no back-end {backend!r}: one of {', '.join(dispatch.BACKENDS)}, or None")
    moves = window(weight.shape[2:], stride, padding, dilation, groups, padding_mode)
    layer = Layer(weight, lora_a, lora_b, scale, bias, dropout_p, seed)
    n = len(moves.stride)
    in_plain_torch = conv_plain.serves(x, layer, backend)
    autocast = None if x.is_nested else autocast_of(x)
    if not (plain.is_tracing() or x.is_nested):  # a trace warns of comparisons of sizes
        conv_check.operands(x, layer, magnitude, moves, autocast is not None)
    batch = x if x.dim() != n + 1 else x.unsqueeze(0)
    if in_plain_torch:
        y = conv_plain.lora_conv(batch, layer, magnitude, moves)
    else:
        if weight.requires_grad:
            layer = Layer(check.frozen(weight), lora_a, lora_b, scale, bias, dropout_p, seed)
        y = _lora_conv(batch, layer, magnitude, moves, backend, autocast)
    return y if batch is x else y.squeeze(0)


def _lora_conv(
    x: Tensor, layer: Layer, magnitude: Tensor | None, moves: Window, backend: str | None, autocast: torch.dtype | None
) -> Tensor:
    """Return y of an x [B, C, ...]."""
    w, a, b, scale, bias, p, seed = layer
    assert isinstance(w, Tensor), "a convolution has no quantised weight"
    rows = rows_of(x, w.shape[2:], moves)
    if rows is not None:
        return _of_rows(x, rows, layer, magnitude, backend)
    s, b = check.scale(scale, b)
    drawn = None
    if p > 0:
        drawn = draw_seed(x.device) if seed is None else check.seed(seed, x.device)
    if autocast is not None:  # W is converted in the forward and again in the backward, so that no copy is saved
        x, a, b = (as_dtype(t, autocast) for t in (x, a, b))
        bias = None if bias is None else as_dtype(bias, autocast)
    how = How(moves, s, p, backend, lies_by_rows(x))
    with no_autocast(device_type(x)):
        x = moves.padded(x)
        if magnitude is None:
            return apply(LoRAConvFunction, x, w, a, b, bias, drawn, how)  # type: ignore[no-any-return]
        if magnitude.dtype in check.HALVES:
            magnitude = as_dtype(magnitude, a.dtype)
        return dora_conv(x, w, a, b, bias, magnitude, drawn, how)


def low_rank_conv(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, moves: Window, *, scale: float | Tensor, dropout_p: float = 0.0
) -> Tensor:
    """Return scale·B (x̂ ∗ A), the half that an adapter adds, for operands that `lora_conv` takes beside a weight. It is
    in A's dtype, or autocast's."""
    n = len(moves.stride)
    batch = x if x.dim() != n + 1 else x.unsqueeze(0)
    if conv_plain.serves(x, Layer(lora_b, lora_a, lora_b, scale), None):
        y = conv_plain.low_rank(batch, lora_a, lora_b, scale, dropout_p, moves)
    else:
        s, b = check.scale(scale, lora_b)
        autocast = autocast_of(x)
        if autocast is not None:
            batch, lora_a, b = (as_dtype(t, autocast) for t in (batch, lora_a, b))
        seed = draw_seed(x.device) if dropout_p > 0 else None
        how = How(moves, s, dropout_p, None, lies_by_rows(batch))
        with no_autocast(device_type(x)):
            y = apply(LoRAConvFunction, moves.padded(batch), None, lora_a, b, None, seed, how)
    return y if batch is x else y.squeeze(0)


def _of_rows(x: Tensor, rows: Tensor, layer: Layer, magnitude: Tensor | None, backend: str | None) -> Tensor:
    """Return y from x as rows [B, ..., K]. It is contiguous where x is, unless the rows are patches."""
    w, a, b, scale, bias, p, seed = layer
    assert isinstance(w, Tensor)
    flat = w.flatten(1), a.flatten(1), b.flatten(1)
    if magnitude is None:
        y = lora_linear(rows, *flat, scale=scale, bias=bias, dropout_p=p, seed=seed, backend=backend)
    else:
        m = magnitude.flatten()
        y = dora_linear(rows, *flat, m, scale=scale, bias=bias, dropout_p=p, seed=seed, backend=backend)
    y = y.movedim(-1, 1)
    return y.contiguous() if w[0, 0].numel() == 1 and x.is_contiguous() else y
