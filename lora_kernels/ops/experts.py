"""`lora_linear_experts`: the experts of one layer, each with a weight and an adapter of its own, over rows that are
sorted by expert.

    y_m = W_e x_m + bias_e + s · B_e (A_e dropout(x_m))          e = the expert of row m
    y_m = 0                                                      for a row without an expert

One call computes all experts, and reads the stacks of their weights and adapters where they lie: nothing of the size
E×N×K is made, in the forward or in the backward. Tan et al., "Scattered Mixture-of-Experts Implementation", 2024
(arXiv:2403.08245), compute experts without padding in this way.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Layer, call_of_experts
from lora_kernels.core.rows import Rows
from lora_kernels.ops import plain_experts
from lora_kernels.ops.autograd import apply, device_type, no_autocast
from lora_kernels.ops.experts_function import LoRALinearExpertsFunction, forward
from lora_kernels.ops.prepare import recorded
from lora_kernels.ops.prepare_experts import prepare


def lora_linear_experts(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Rows,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return y = x W_eᵀ + bias_e + scale · (dropout(x) A_eᵀ) B_eᵀ in the rows of each expert e, with gradients for x,
    A, B and bias. W is frozen.

    Args:
        x: [M, K], fp64, fp32, fp16 or bf16, sorted by expert. M may be 0.
        weight: W [E, N, K], in x's dtype; must not require a gradient. It may be the transposed view of a stored
            [E, K, N], and is never copied as a whole.
        lora_a: A [E, R, K], in x's dtype, or fp32 beside an fp16 or bf16 x. Any strides.
        lora_b: B [E, N, R], in A's dtype. Any strides: PEFT's, in which the expert is the fastest, is
            ``B.view(N, R, E).permute(2, 0, 1)``.
        rows: which rows belong to which expert, as ``Rows.by_id(ids, E).in_order()`` makes it for ids that are sorted
            or for ``x[Rows.by_id(ids, E).order]``. Rows without an expert (id -1) come last.
        scale: s, as in `lora_linear`.
        bias: [E, N], in x's dtype.
        dropout_p: p in [0, 1), as in `lora_linear`.
        seed: the seed of the mask, as in `lora_linear`. The mask is a function of (seed, row of x, column).
        backend: the name of a back-end, which then serves the call or raises; None for the automatic choice.

    Under autocast x and bias are converted to its dtype, and W too, one expert at a time. fp32 A and B are left as they
    are. An expert without rows gets gradients of zeros.

    Calls that torch.jit.trace or torch.export records, and those inside a transform of torch.func or with tangents of
    forward-mode AD, are computed in plain torch operations: see `lora_kernels.ops.plain_experts`.

    Returns:
        y [M, N], in x's dtype, contiguous; zeros in rows without an expert.

    Raises:
        TypeError, ValueError: what `lora_linear` raises for one expert; stacks of several numbers of experts; rows that
            are not those of x, or not sorted by expert.
        RuntimeError: from autograd, on double backward.
    """
    layer = Layer(weight, lora_a, lora_b, scale, bias, dropout_p, seed)
    if plain_experts.serves(x, layer, rows, backend):
        return plain_experts.lora_linear_experts(x, layer, rows)
    x, base, adapter, rows = prepare(x, layer, rows)
    with no_autocast(device_type(x)):
        if not recorded(x, base, adapter):
            y, _ = forward(x, base, adapter, rows, backend, False)
            return y
        (w, own_bias), (a, b, s, p, drawn) = base, adapter
        # A compiler takes the rows as tensors, so that the program it makes serves any rows.
        kept = None if rows.known_counts is None else rows
        return apply(  # type: ignore[no-any-return]
            LoRALinearExpertsFunction, x, w, a, b, own_bias, drawn, rows.order, rows.starts, (s, p, kept, backend)
        )


def explain_experts(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    rows: Rows,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> dispatch.Explanation:
    """Return which back-end `lora_linear_experts` would run for these operands, and every reason why the others would
    not be chosen. The arguments are those of `lora_linear_experts`, and the same errors are raised. Nothing is
    computed."""
    layer = Layer(weight, lora_a, lora_b, 1.0, bias, dropout_p, 0 if dropout_p else None)
    x, base, adapter, rows = prepare(x, layer, rows)
    counts = rows.counts
    told = f"{len(counts)} experts; rows of each: {', '.join(map(str, counts))}"
    told += f"; {rows.M - sum(counts)} rows without an expert"
    return replace(dispatch.explain(call_of_experts("forward_experts", x, base, adapter), backend), rows=told)
