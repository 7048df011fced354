"""Several active adapters of one layer of PEFT where one of them has dropout or is DoRA.

PEFT computes active adapters one after the other, in their order. With y what the base and the adapters before have
given,

    plain LoRA                       y ← y + s·(dropout(x) Aᵀ) Bᵀ
    DoRA without dropout             y ← d ⊙ (y - bias + s·(x Aᵀ) Bᵀ) + bias
    DoRA whose dropout is training   y ← y + (d - 1) ⊙ (x̂ Wᵀ) + d ⊙ s·(x̂ Aᵀ) Bᵀ          x̂ = dropout(x)

with d = m / ‖W + s·B A‖ of this DoRA adapter alone. So DoRA without dropout scales what the adapters before it have
added, and with dropout it does not. Merging does what the first of the two does.

The first call is fused, with as many adapters as it can take, and each further adapter of plain LoRA is one call of
`add_low_rank`. A further DoRA is torch operations on [M, R] and [M, N]. B A and the unit matrix of size K, which PEFT
forms for it, are not formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.ops import check
from lora_kernels.ops.around import add_low_rank
from lora_kernels.ops.autograd import no_autocast
from lora_kernels.ops.dora_norm import ratio, weight_norm
from lora_kernels.peft.reading import Operands, PeftAdapter, as_one_adapter


def why_not(layer: Any, adapters: Mapping[str, PeftAdapter], by_row: bool, dtype: torch.dtype) -> str:
    """Return why `adapters` of a layer cannot be computed together in `dtype`, or "" where they can. With `by_row` each
    of them has rows of its own."""
    dora = [name for name, adapter in adapters.items() if adapter.magnitude is not None]
    if dora and (by_row or layer.quantised_base):
        return "a DoRA adapter beside others"
    if len(dora) > 1 and dtype in check.HALVES:
        # The gradient of what the second DoRA scales would be rounded to 16 bits, and PEFT's is not.
        return "several DoRA adapters in 16 bits"
    for name in dora:
        dropout = layer._modules["lora_dropout"]._modules[name]
        if (type(dropout) is nn.Dropout and layer.training) != (adapters[name].p > 0):
            return "a DoRA adapter beside others, whose dropout drops nothing while the layer is in training mode"
    return ""


def compute(layer: Any, x: Tensor, operands: Operands) -> Tensor:
    """Return y of the base with the adapters of `operands`, in their order."""
    names = list(operands.adapters)
    first = _together(operands)
    y = _in_one_call(layer, x, operands.with_adapters({name: operands.adapters[name] for name in names[:first]}))
    dtype = y.dtype
    for name in names[first:]:
        adapter = operands.adapters[name]
        if adapter.magnitude is not None:
            y = _dora(y, x, operands, adapter)
            continue
        a, b, scale, p = adapter.a, adapter.b, adapter.scale, adapter.p
        y = add_low_rank(y, x, a, b, scale=scale, dropout_p=p, backend=layer._backend)
        if adapter.b_bias is not None:
            y = y + adapter.b_bias * scale
    return y.to(dtype)


def _together(operands: Operands) -> int:
    """Return how many of the adapters, from the first on, one call computes: one, where any has dropout. Otherwise
    those of plain LoRA, and the DoRA adapter after them, which scales them."""
    adapters = list(operands.adapters.values())
    if any(each.p for each in adapters):
        return 1
    plain = 0
    while plain < len(adapters) and adapters[plain].magnitude is None:
        plain += 1
    if plain == 0:
        return 1
    # d scales the biases of adapters, and not the base's. In 16 bits the norm is rounded to m's dtype, and several
    # adapters in one are in fp32.
    alone = any(each.b_bias is not None or each.a.dtype in check.HALVES for each in adapters[: plain + 1])
    return plain if alone or plain == len(adapters) else plain + 1


def _in_one_call(layer: Any, x: Tensor, operands: Operands) -> Tensor:
    """Return y of the base with adapters of which only the last may be DoRA."""
    *before, last = operands.adapters.values()
    if not before or last.magnitude is None:
        return layer.compute_alike(x, operands)  # type: ignore[no-any-return]
    _, a, b, scale, _, _ = as_one_adapter(operands)
    whole = PeftAdapter(a, b, None, scale, 0.0, last.magnitude)
    return layer.compute_dora(x, operands, whole, (last.a, last.b, last.scale))  # type: ignore[no-any-return]


def _dora(y: Tensor, x: Tensor, operands: Operands, adapter: PeftAdapter) -> Tensor:
    """Return y with the DoRA adapter `adapter`."""
    assert isinstance(operands.w, Tensor)
    assert adapter.magnitude is not None
    w, bias = operands.w, operands.bias
    low = x.to(adapter.a.dtype)
    if adapter.p > 0:
        low = F.dropout(low, adapter.p)  # x̂ multiplies W too, so its mask is torch's
    added = F.linear(F.linear(low, adapter.a), adapter.b) * adapter.scale
    with no_autocast(y.device.type):
        scale, b = check.scale(adapter.scale, adapter.b)
        d = ratio(adapter.magnitude, weight_norm(w, adapter.a, b, scale, adapter.magnitude))
    y = y.to(d.dtype)
    if adapter.p > 0:
        return y + (d - 1) * F.linear(low.to(w.dtype), w) + d * added
    if bias is None:
        return d * (y + added)
    return d * (y - bias + added) + bias
