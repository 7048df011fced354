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
    w, a, b, _, bias, _, _ = layer
    n, g = w.dim() - 2, window.groups
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in _named(x, layer, magnitude) if t is not None)
    if n not in (1, 2, 3) or x.dim() not in (n + 1, n + 2) or a.dim() != n + 2 or b.dim() != n + 2:
        raise ValueError(
            "x must be [B, C, ...] or [C, ...], weight [N, C/groups, k, ...], lora_a [R, C, k, ...] and lora_b "
            f"[N, R/groups, 1, ...], with one to three dimensions at the end; got {shapes}"
        )
    (N, of_group, *kernel), R, C = w.shape, a.shape[0], x.shape[-1 - n]
    if 0 in (*w.shape, R):
        raise ValueError(f"no size of weight and no rank may be 0; got {shapes}")
    if of_group * g != C or N % g:
        raise ValueError(f"x must have C = {of_group} · {g} channels, and N must be a multiple of groups; got {shapes}")
    if list(a.shape[2:]) != kernel or a.shape[1] not in (C, of_group):
        either = f"{C}" if g == 1 else f"{C}, or {of_group} for an A in groups"
        raise ValueError(f"lora_a must have the kernel of weight and C = {either}; got {shapes}")
    if R % g or tuple(b.shape) != (N, R // g, *(1,) * n):
        raise ValueError(
            f"the rank must be a multiple of groups, and lora_b [N, R/groups, 1, ...], here "
            f"{(N, R // g, *(1,) * n)}; got groups {g}, {shapes}"
        )
    if magnitude is not None and tuple(magnitude.shape) != (1, N, *(1,) * n):
        raise ValueError(f"magnitude must be {(1, N, *(1,) * n)}; got {shapes}")
    if magnitude is not None and a.shape[1] != of_group:
        raise ValueError(
            f"DoRA needs an A that sees the {of_group} channels that W sees: otherwise W + s·B A is no weight, whose "
            f"norm could be taken. Give A in groups, [R, C/groups, k, ...]; got {shapes}"
        )
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"bias must be [N], here ({N},); got {shapes}")
    # Shapes fit now. What a linear layer says of dtypes, devices and p holds here too.
    tensors = [t for _, t in _named(x, layer, None) if t is not None]
    if all(t.dtype == x.dtype and t.device == x.device for t in tensors) and x.is_floating_point():
        if not 0 <= layer.dropout_p < 1:
            raise ValueError(f"dropout_p must lie in [0, 1), got {layer.dropout_p}")
        return
    one_w, one_a, one_b = (t.new_empty(1, 1) for t in (w, a, b))
    one = Layer(one_w, one_a, one_b, 1.0, None if bias is None else bias.new_empty(1), layer.dropout_p)
    check.operands(x.new_empty(0, 1), one, any_w)


def _named(x: Tensor, layer: Layer, magnitude: Tensor | None) -> list[tuple[str, Any]]:
    named = [("x", x), ("weight", layer.weight), ("lora_a", layer.lora_a), ("lora_b", layer.lora_b)]
    return [*named, ("bias", layer.bias), ("magnitude", magnitude)]
