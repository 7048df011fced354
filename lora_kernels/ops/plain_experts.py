"""Experts in plain torch operations, for the calls that `plain` serves for one layer: those that torch.jit.trace or
torch.export records, those inside a transform of torch.func or with tangents of forward-mode AD, and those with an x of
a subclass of Tensor that knows torch's operators only.

    y_e = x_e W_eᵀ + bias_e + s · (x̂_e A_eᵀ) B_eᵀ

Where the rows of each expert are known, every expert is computed over its own. What is recorded serves any rows, so it
computes every expert over all of them, and takes for each row that of its expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from lora_kernels.core import dropout
from lora_kernels.core.operands import Layer
from lora_kernels.core.rows import Rows
from lora_kernels.ops import check, plain
from lora_kernels.ops.autograd import as_dtype
from lora_kernels.ops.prepare_experts import check_operands, fitting

_transforms_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing


def serves(x: Tensor, layer: Layer, rows: Rows, backend: str | None) -> bool:
    """Return whether the function below serves a call, after a check of its operands.

    Raises ValueError, TypeError or RuntimeError for operands that do not fit together, for an x that is not dense, and
    where a back-end is named that cannot serve such a call.
    """
    compiling = torch.compiler.is_compiling()
    # `prepare.prepare` asks the same.
    if not (
        x.layout is not torch.strided
        or (type(x) is not Tensor and type(x) is not Parameter)
        or x.is_nested
        or _transforms_active()
        or (plain.is_exporting() if compiling else _is_tracing() or forward_ad._current_level >= 0)
    ):
        return False
    if x.layout is not torch.strided or x.is_nested:
        raise ValueError(
            f"lora_linear_experts needs a dense x [M, K], sorted by expert, and x is {plain.kind_of(x)}: call "
            "to_dense() on x, or pass x.values() of a nested one"
        )
    if not plain.is_tracing():  # sizes are not compared while torch.jit.trace records them
        any_w = torch.is_autocast_enabled(x.device.type)
        check_operands(x, layer, any_w)
    w, a, b, scale, bias, p, seed = layer
    assert isinstance(w, Tensor)
    one = Layer(w[0], a[0], b[0], scale, None if bias is None else bias[0], p, seed)
    return plain.serves("lora_linear_experts", x, one, backend)


def lora_linear_experts(x: Tensor, layer: Layer, rows: Rows) -> Tensor:
    """Return y as torch computes it. `serves` has checked the operands."""
    w, a, b, scale, bias, p, seed = layer
    assert isinstance(w, Tensor)
    s, b = check.scale(scale, b)
    x_hat = x
    if p > 0:
        x_hat = F.dropout(x, p) if seed is None else dropout.dropout(x, p, check.seed(seed, x.device))

    def of(e: int, own_x: Tensor, own_x_hat: Tensor) -> Tensor:
        y = F.linear(own_x, w[e], None if bias is None else bias[e])
        return as_dtype(y + F.linear(F.linear(as_dtype(own_x_hat, a.dtype), a[e]), b[e]) * s, y.dtype)

    if plain.is_tracing() or plain.is_exporting() or rows.known_in_order is None:
        ids = rows.ids()
        y = of(0, x, x_hat)
        zero = y.new_zeros(())
        y = torch.where((ids == 0)[:, None], y, zero)
        for e in range(1, w.shape[0]):
            y = torch.where((ids == e)[:, None], of(e, x, x_hat), y)
        return y
    rows = fitting(rows, x, w.shape[0])
    parts = [of(e, x[first:last], x_hat[first:last]) for e, first, last in rows.spans()]
    rest = x.shape[0] - sum(rows.counts)
    if rest or not parts:
        parts.append(of(0, x[:0], x_hat[:0]).new_zeros(rest, w.shape[1]))
    return torch.cat(parts)
