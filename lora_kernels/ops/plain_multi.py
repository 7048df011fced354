"""Many adapters in plain torch operations, for the calls that `plain` serves for one: those that torch.jit.trace or
torch.export records, those inside a transform of torch.func or with tangents of forward-mode AD, and those with an x of
a subclass of Tensor that knows torch's operators only.

    y = x Wᵀ + bias + Σ_i own_i ⊙ (s_i · (x̂_i A_iᵀ) B_iᵀ + s_i · bias_i)          own_i = 1 in the rows of adapter i

Every adapter is computed over all rows, so that what is recorded serves any rows. An x that is not dense is refused:
its rows have no numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from lora_kernels.core import dropout
from lora_kernels.core.many import Adapter, AdapterStack
from lora_kernels.core.operands import Layer
from lora_kernels.core.rows import Rows
from lora_kernels.ops import check, plain, prepare_multi
from lora_kernels.ops.autograd import as_dtype
from lora_kernels.quant.weight import QuantizedWeight

_transforms_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing


def serves(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    adapters: Sequence[Adapter | None] | AdapterStack,
    rows: Rows,
    bias: Tensor | None,
    backend: str | None,
) -> bool:
    """Return whether the functions below serve a call, after a check of its operands.

    Raises ValueError, TypeError or RuntimeError for operands that do not fit together, for an x that is not dense, and
    where a back-end is named that cannot serve such a call.
    """
    compiling = torch.compiler.is_compiling()
    # `prepare.prepare` asks the same, and spares every small layer the call of a function.
    if not (
        x.layout is not torch.strided
        or (type(x) is not Tensor and type(x) is not Parameter)
        or x.is_nested
        or _transforms_active()
        or (plain.is_exporting() if compiling else _is_tracing() or forward_ad._current_level >= 0)
    ):
        return False
    if x.layout is not torch.strided or x.is_nested:
        way_out = "pass x.values(), with Rows.by_length" if x.is_nested else "call to_dense() on x"
        raise ValueError(
            f"lora_linear_multi needs a dense x, whose rows have numbers, and x is {plain.kind_of(x)}: {way_out}"
        )
    if hasattr(x, "to_local"):
        raise ValueError(
            f"x is a {type(x).__name__}, which torch does not compute beside the plain tensors of Rows: pass the x, "
            "weight and adapters of this process, as to_local() gives them"
        )
    prepare_multi.check_kinds(adapters, rows)
    layers = _layers(weight, adapters, bias) or [Layer(weight, *prepare_multi.nothing(x, weight)[:2], 1.0, bias)]
    served = [plain.serves("lora_linear_multi", x, layer, backend) for layer in layers]  # every layer is checked
    return any(served)


def lora_linear_multi(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    adapters: Sequence[Adapter | None] | AdapterStack,
    rows: Rows,
    bias: Tensor | None,
) -> Tensor:
    """Return y as torch computes it. `serves` has checked the operands."""
    flat = x.reshape(-1, x.shape[-1])
    if not plain.is_tracing():
        rows = prepare_multi.fitting(rows, x, len(adapters))
    elif rows.per_sample:  # sizes are not compared while torch.jit.trace records them
        rows = rows.repeated(flat.shape[0] // x.shape[0])
    y = F.linear(flat, plain.dense_weight(weight, x.dtype), bias)
    ids, zero = rows.ids(), y.new_zeros(())
    for i, adapter in enumerate(adapters):
        if adapter is None:
            continue
        a, b, scale, p, seed = adapter[:5]
        own_bias = adapter.bias if isinstance(adapter, Adapter) else None
        own = (ids == i)[:, None]
        s, b = check.scale(scale, b)
        x_hat = torch.where(own, _dropout(flat, p, seed, rows), zero)
        low = F.linear(F.linear(as_dtype(x_hat, a.dtype), a), b) * s
        if own_bias is not None:
            low = low + own_bias * scale
        y = torch.where(own, as_dtype(y + low, y.dtype), y)
    return y.view(*x.shape[:-1], y.shape[-1])


def _layers(
    weight: Tensor | QuantizedWeight, adapters: Sequence[Adapter | None] | AdapterStack, bias: Tensor | None
) -> list[Layer]:
    """Return the operands of each adapter as those of a layer of its own."""
    return [Layer(weight, *each[:3], bias, *each[3:5]) for each in adapters if each is not None]


def _dropout(x: Tensor, p: float, seed: Tensor | int | None, rows: Rows) -> Tensor:
    """Return x̂, with torch's dropout where no seed is given."""
    if p == 0:
        return x
    if seed is None:
        return F.dropout(x, p)
    keep = dropout.keep_mask(check.seed(seed, x.device), x.shape[0], x.shape[1], p)[rows.places()]
    return torch.where(keep, x, 0.0) * dropout.rescale(p)
