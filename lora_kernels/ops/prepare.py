"""The first step of every call, before its autograd Function: autocast, checks, scale and seed, in this order."""

from __future__ import annotations

import torch
from torch import Tensor, strided
from torch.autograd import forward_ad
from torch.nn import Parameter

from lora_kernels.core.dropout import draw_seed
from lora_kernels.core.operands import Adapter, Base, Layer
from lora_kernels.ops import check, plain
from lora_kernels.ops.autograd import autocast_of, outlived
from lora_kernels.quant.weight import QuantizedWeight

_AUTOCAST = (torch.float32, *check.HALVES)
_INFINITY = float("inf")

# The private functions of torch that every call asks.
_transforms_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing


Prepared = tuple[Tensor, Base, Adapter, bool]
"""The operands of a call, checked, as (x, base, adapter, autocast).

x is [..., K], in autocast's dtype where autocast is on for x's device, as `autocast` tells. W is in its own dtype: it
is converted in the forward and again in the backward, so that no copy of it is saved in between."""


def prepare(name: str, x: Tensor, layer: Layer, backend: str | None, quantised: bool = False) -> Prepared | None:
    """Return the operands of one layer in the form that back-ends take, or None where `plain` serves the call. `name`
    is the public function, for errors; `quantised` allows a `QuantizedWeight`, whose dtype may differ from x's.

    Raises TypeError or ValueError for operands that do not fit together, and what `plain.serves` raises.
    """
    compiling = torch.compiler.is_compiling()
    if (
        x.layout is not strided
        or (type(x) is not Tensor and type(x) is not Parameter)  # torch 2.6 cannot trace a look-up in a set of types
        or x.is_nested
        or _transforms_active()
        or (plain.is_exporting() if compiling else _is_tracing() or forward_ad._current_level >= 0)
    ) and plain.serves(name, x, layer, backend):
        return None
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
    if w.requires_grad:
        w = check.frozen(w)  # type: ignore[arg-type]  # a QuantizedWeight requires none
    if compiling or type(scale) is not float or not -_INFINITY < scale < _INFINITY:
        scale, b = check.scale(scale, b)
    drawn = None
    if p > 0:
        drawn = draw_seed(x.device) if seed is None else check.seed(seed, x.device)
    return x, Base(w, bias), Adapter(a, b, scale, p, drawn), autocast


def bias_beside(x: Tensor, bias: Tensor) -> Tensor:
    """Return the bias of a `QuantizedWeight`, which may have another dtype than x, in x's dtype. Under autocast, which
    converts both, and where either is no floating number, which the checks refuse, it is returned as it is."""
    if bias.dtype in check.DTYPES and x.dtype in check.DTYPES and autocast_of(x) is None:
        return bias.to(x.dtype)
    return bias


def recorded(x: Tensor, base: Base, adapter: Adapter) -> bool:
    """Return whether a call needs its autograd Function: to compute a gradient, or for a tensor that has outlived a
    transform of torch.func."""
    a, b, bias = adapter.a, adapter.b, base.bias
    return (
        torch.is_grad_enabled()
        and (x.requires_grad or a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad))
    ) or (not torch.compiler.is_compiling() and outlived(x, base.w, a, b, bias))


def _as_autocast_asks(x: Tensor, layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Layer]:
    """Return x, bias, A and B in autocast's dtype, but fp32 A and B as they are."""
    w, a, b, scale, bias, p, seed = layer
    a, b = (t.to(dtype) if t.dtype in check.HALVES else t for t in (a, b))
    if bias is not None and bias.dtype in check.DTYPES:  # what is no floating number is refused, not converted
        bias = bias.to(dtype)
    return x.to(dtype), Layer(w, a, b, scale, bias, p, seed)  # torch 2.6 cannot trace NamedTuple._replace
