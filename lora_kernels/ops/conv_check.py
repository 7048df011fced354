"""The checks of a convolution's operands. Every error names the values that are at fault."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_kernels.core.operands import Layer
from lora_kernels.ops import check
from lora_kernels.ops.conv_window import Window


def operands(x: Tensor, layer: Layer, magnitude: Tensor | None, window: Window, any_w: bool) -> None:
    """Raise TypeError or ValueError where x and the operands of a convolution do not fit together, or p is no
    probability below 1. `any_w` allows W another dtype than x's."""
    w: Any
    w, a, b, _, bias, p, _ = layer
    dtype, device = x.dtype, x.device
    if fault := _fault(x, w, a, b, bias, magnitude, window):
        named = {"x": x, "weight": w, "lora_a": a, "lora_b": b, "bias": bias, "magnitude": magnitude}
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in named.items() if t is not None)
        raise ValueError(f"{fault}; got groups {window.groups}, {shapes}")
    if (
        w.dtype == a.dtype == b.dtype == dtype
        and dtype in check.DTYPES
        and w.device == a.device == b.device == device
        and (bias is None or (bias.dtype == dtype and bias.device == device))
        and 0 <= p < 1
    ):
        return
    # Shapes fit. What a linear layer says of dtypes, devices and p holds here too.
    one_w, one_a, one_b = (t.new_empty(1, 1) for t in (w, a, b))
    one = Layer(one_w, one_a, one_b, 1.0, None if bias is None else bias.new_empty(1), p)
    check.operands(x.new_empty(0, 1), one, any_w)


def _fault(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, magnitude: Tensor | None, window: Window
) -> str:
    """Return what is wrong with the shapes, or "" where nothing is."""
    x_shape, w_shape, a_shape, b_shape = x.shape, w.shape, a.shape, b.shape
    n, g = len(w_shape) - 2, window.groups
    ones = (1,) * n
    if n not in (1, 2, 3) or len(x_shape) not in (n + 1, n + 2) or not len(a_shape) == len(b_shape) == n + 2:
        return (
            "x must be [B, C, ...] or [C, ...], weight [N, C/groups, k, ...], lora_a [R, C, k, ...] and lora_b "
            "[N, R/groups, 1, ...], with one to three dimensions at the end"
        )
    N, of_group, R, C = w_shape[0], w_shape[1], a_shape[0], x_shape[-1 - n]
    if 0 in w_shape or R == 0:
        return "no size of weight and no rank may be 0"
    if of_group * g != C or N % g:
        return f"x must have {of_group} · groups channels, and N must be a multiple of groups"
    # Not as `a_shape[1] not in (C, of_group)`, to which torch.compile(dynamic=True) gives a wrong answer.
    if a_shape[2:] != w_shape[2:] or (a_shape[1] != C and a_shape[1] != of_group):
        either = f"{C}" if g == 1 else f"{C}, or {of_group} for an A in groups"
        return f"lora_a must have the kernel of weight and C = {either}"
    if R % g or b_shape != (N, R // g, *ones):
        return f"the rank must be a multiple of groups, and lora_b {(N, R // g, *ones)}"
    if bias is not None and bias.shape != (N,):
        return f"bias must be ({N},)"
    if magnitude is None:
        return ""
    if magnitude.shape != (1, N, *ones):
        return f"magnitude must be {(1, N, *ones)}"
    if a_shape[1] != of_group:
        return (
            f"DoRA needs an A that sees the {of_group} channels that W sees: otherwise W + s·B A is no weight, whose "
            "norm could be taken. Give A in groups, [R, C/groups, k, ...]"
        )
    return ""
