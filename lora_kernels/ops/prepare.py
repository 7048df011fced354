"""The first step of every call, before its autograd Function: autocast, checks, scale and seed, in this order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.core.dropout import draw_seed
from lora_kernels.core.operands import Adapter, Base, Layer
from lora_kernels.ops import check
from lora_kernels.ops.autograd import outlived
from lora_kernels.quant.weight import QuantizedWeight

_AUTOCAST = (torch.float32, *check.HALVES)
_INFINITY = float("inf")


class Prepared(NamedTuple):
    """The operands of a call, checked."""

    x: Tensor
    """[..., K], in autocast's dtype where autocast is on."""
    base: Base
    """W in its own dtype. Under autocast it is converted in the forward and again in the backward, so that no copy of
    it is saved in between."""
    adapter: Adapter
    autocast: bool
    """Whether autocast is on for x's device."""


def prepare(name: str, x: Tensor, layer: Layer, quantised: bool = False) -> Prepared:
    """Return the operands of one layer in the form that back-ends take. `name` is the public function, for errors;
    `quantised` allows a `QuantizedWeight`, whose dtype may differ from x's.

    Raises TypeError or ValueError for operands that do not fit together, RuntimeError inside a transform of torch.func
    that differentiates.
    """
    compiling = torch.compiler.is_compiling()
    device = "cpu" if not compiling and x.is_cpu else x.device.type  # `device_type`, without the time of a call
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast and x.dtype in _AUTOCAST:
        x, layer = _as_autocast_asks(x, layer, torch.get_autocast_dtype(device))
    w, a, b, scale, bias, p, seed = layer
    any_w = autocast
    if quantised and isinstance(w, QuantizedWeight):
        any_w = True
        if not w.checked:
            w.check()
    check.operands(x, layer, any_w)
    if compiling or type(scale) is not float or not -_INFINITY < scale < _INFINITY:
        scale, b = check.scale(scale, b)
    drawn = None
    if p > 0:
        drawn = draw_seed(x.device) if seed is None else check.seed(seed, x.device)
    if torch._C._are_functorch_transforms_active():
        _refuse_transforms(name)
    return Prepared(x, Base(w, bias), Adapter(a, b, scale, p, drawn), autocast)


def recorded(x: Tensor, base: Base, adapter: Adapter) -> bool:
    """Return whether a call needs its autograd Function: to compute a gradient, to refuse forward-mode AD, which
    torch.no_grad does not switch off, or for a tensor that has outlived a transform of torch.func."""
    a, b, bias = adapter.a, adapter.b, base.bias
    return (
        forward_ad._current_level >= 0
        or (
            torch.is_grad_enabled()
            and (x.requires_grad or a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad))
        )
        or outlived(x, base.w, a, b, bias)
    )


def _as_autocast_asks(x: Tensor, layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Layer]:
    """Return x, bias, A and B in autocast's dtype, but fp32 A and B as they are."""
    w, a, b, scale, bias, p, seed = layer
    a, b = (t.to(dtype) if t.dtype in check.HALVES else t for t in (a, b))
    if bias is not None and bias.dtype in check.DTYPES:  # what is no floating number is refused, not converted
        bias = bias.to(dtype)
    return x.to(dtype), Layer(w, a, b, scale, bias, p, seed)  # torch 2.6 cannot trace NamedTuple._replace


def _refuse_transforms(name: str) -> None:
    """Raise RuntimeError inside torch.func's transforms that differentiate. They find nothing to differentiate in an
    operator that is called directly, nor, while a compiler traces them, in an autograd Function. The gradients would
    silently be zeros."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        raise RuntimeError(
            f"{name} does not go with torch.func's grad, vjp, jvp and what is built on them, nor with vmap while "
            "gradients are recorded (under torch.no_grad() it does). Take loss.backward() or torch.autograd.grad, or "
            "compute this layer in plain torch, x @ W.T + scale * (x @ A.T @ B.T)"
        )
