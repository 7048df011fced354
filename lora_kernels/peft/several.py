"""Several active adapters of one layer of PEFT where one of them has dropout or is DoRA.

PEFT computes active adapters one after the other, in their order. With y what the base and the adapters before have
given,

    plain LoRA                       y ← y + s·(dropout(x) Aᵀ) Bᵀ
    DoRA without dropout             y ← d ⊙ (y - bias + s·(x Aᵀ) Bᵀ) + bias
    DoRA whose dropout is training   y ← y + (d - 1) ⊙ (x̂ Wᵀ) + d ⊙ s·(x̂ Aᵀ) Bᵀ          x̂ = dropout(x)

with d = m / ‖W + s·B A‖ of this DoRA adapter alone. So DoRA without dropout scales what the adapters before it have
added, and with dropout it does not. Merging does what the first of the two does.

The first call is fused, with as many adapters as it can take. The others are torch operations on [M, R] and [M, N].
B A and the unit matrix of size K, which PEFT forms for DoRA, are not formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.ops import check
from lora_kernels.ops.autograd import no_autocast
from lora_kernels.ops.dora_norm import ratio, weight_norm
from lora_kernels.peft.reading import Operands, PeftAdapter


def why_not(layer: Any, adapters: Mapping[str, PeftAdapter], by_row: bool) -> str:
    """Return why `adapters` of a layer cannot be computed together, or "" where they can. With `by_row` each of them
    has rows of its own."""
    dora = [name for name, adapter in adapters.items() if adapter.magnitude is not None]
    if dora and (by_row or layer.quantised_base):
        return "a DoRA adapter beside others"
    for name in dora:
        dropout = layer._modules["lora_dropout"]._modules[name]
        if (type(dropout) is nn.Dropout and layer.training) != (adapters[name].p > 0):
            return "a DoRA adapter beside others, whose dropout drops nothing while the layer is in training mode"
    return ""


def compute(x: Tensor, operands: Operands, in_one_call: Callable[[Tensor, Operands], Tensor]) -> Tensor:
    """Return y of the base with the adapters of `operands`. ``in_one_call(x, operands)`` returns y of the base with one
    adapter, or with several that are neither DoRA nor have dropout."""
    names = list(operands.adapters)
    first = _together(operands)
    y = in_one_call(x, operands._replace(adapters={name: operands.adapters[name] for name in names[:first]}))
    dtype = y.dtype
    for name in names[first:]:
        adapter = operands.adapters[name]
        low = x.to(adapter.a.dtype)
        if adapter.p > 0:  # every adapter has a mask of its own
            low = F.dropout(low, adapter.p)
        added = F.linear(F.linear(low, adapter.a), adapter.b, adapter.b_bias) * adapter.scale
        if adapter.magnitude is None:
            y = y + added
        else:
            y = _dora(y, low, added, operands, adapter)
    return y.to(dtype)


def _together(operands: Operands) -> int:
    """Return how many of the adapters, from the first on, one call computes."""
    adapters = list(operands.adapters.values())
    if any(each.p for each in adapters):
        return 1
    plain = 0
    while plain < len(adapters) and adapters[plain].magnitude is None:
        plain += 1
    return max(plain, 1)


def _dora(y: Tensor, low: Tensor, added: Tensor, operands: Operands, adapter: PeftAdapter) -> Tensor:
    """Return y with a DoRA adapter, where `low` is x̂ and `added` is s·(x̂ Aᵀ) Bᵀ."""
    assert isinstance(operands.w, Tensor)
    assert adapter.magnitude is not None
    w, bias = operands.w, operands.bias
    with no_autocast(y.device.type):
        scale, b = check.scale(adapter.scale, adapter.b)
        d = ratio(adapter.magnitude, weight_norm(w, adapter.a, b, scale, adapter.magnitude))
    y = y.to(d.dtype)
    if adapter.p > 0:
        return y + (d - 1) * F.linear(low.to(w.dtype), w) + d * added
    if bias is None:
        return d * (y + added)
    return d * (y - bias + added) + bias
