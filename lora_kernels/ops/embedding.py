"""`lora_embedding`: y = E[ids] + s · Aᵀ[ids] Bᵀ, a table look-up with LoRA or DoRA, with its autograd Function.

    lora_embedding → check → LoRAEmbeddingFunction → embedding_passes, or the registered operators of them
                           → plain torch operations, where a Function or an operator cannot serve the call

The look-ups are torch's own on every device, and the products those of `embedding_passes`. So there are no back-ends to
choose from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.ops import check, embedding_operators, embedding_passes, plain
from lora_kernels.ops.autograd import (
    apply,
    as_dense,
    device_type,
    gradients_of,
    keeps_hooks,
    no_autocast,
    outlived,
)
from lora_kernels.ops.dora_norm import ratio
from lora_kernels.ops.embedding_norm import column_norm
from lora_kernels.ops.embedding_passes import Table, without_row
from lora_kernels.ops.watched import PLAIN, watched

_transforms_active = torch._C._are_functorch_transforms_active
_IDS = (torch.int64, torch.int32)


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_a_t: Tensor,
    lora_b: Tensor,
    *,
    scale: float | Tensor,
    embed_scale: float | Tensor = 1.0,
    padding_idx: int | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """Return y = embed_scale · (E[ids] + scale · Aᵀ[ids] Bᵀ), with gradients for A and B. The table E is frozen.

    With a magnitude it is DoRA, y = embed_scale · d ⊙ (E[ids] + scale · Aᵀ[ids] Bᵀ) with d = m / ‖E + scale · Aᵀ Bᵀ‖ by
    columns, a constant for autograd but for m. Hu et al., 2021 (arXiv:2106.09685); Liu et al., 2024 (arXiv:2402.09353).

    Args:
        ids: [...], int64 or int32, each at least 0 and below V. It may be empty.
        weight: E [V, D], fp64, fp32, fp16 or bf16; must not require a gradient.
        lora_a_t: Aᵀ [V, R], a row for each token, in E's dtype, or fp32 beside an fp16 or bf16 E. Any strides; the
            transposed view of an A [R, V] is as fast.
        lora_b: B [D, R], in A's dtype.
        scale: s, as for `lora_linear`.
        embed_scale: the number by which the layer multiplies its output, as Gemma's embeddings do; or a tensor of one
            element, which is converted to E's dtype and gets no gradient.
        padding_idx: the row of E that is not adapted. That row of Aᵀ counts as zero, and its gradient is zero.
        magnitude: m [D], in A's dtype or fp32 (fp64 beside an fp64 A).

    ids and h [M, R], the rows of Aᵀ, are saved for the backward, h only if B needs a gradient. Nothing of size M×D is
    allocated beside y, and nothing of size V×D. Autocast changes nothing, as it changes nothing for an embedding.
    Gradients are bit-identical from run to run on a CPU; on a GPU torch's backward of an embedding adds them,
    and that has not been run here. Transforms of torch.func, forward-mode AD, export and jit.trace are served by plain
    torch operations.

    Returns:
        y [..., D], in E's dtype, contiguous.

    Raises:
        TypeError: for dtypes other than the above.
        ValueError: for shapes that do not fit together, operands on different devices, an E that requires a gradient, a
            scale that is not finite, or a padding_idx outside of the table.
        IndexError: on a CPU, for an id outside of the table.
        RuntimeError: from autograd, on double backward.
    """
    if not plain.is_tracing():  # a trace warns of comparisons of sizes
        _check(ids, weight, lora_a_t, lora_b, embed_scale, magnitude)
    if weight.requires_grad:
        weight = check.frozen(weight)
    if padding_idx is not None:
        padding_idx = _row(padding_idx, weight.shape[0])
    if _needs_plain(ids, weight, lora_a_t, lora_b, scale, embed_scale, magnitude):
        return _plain(ids, weight, lora_a_t, lora_b, scale, embed_scale, padding_idx, magnitude)
    scale, lora_b = check.scale(scale, lora_b)
    g, factor = (1.0, embed_scale.detach()) if isinstance(embed_scale, Tensor) else (float(embed_scale), None)
    with no_autocast(device_type(weight)):
        d = None
        if magnitude is not None:
            norm = column_norm(weight, without_row(lora_a_t, padding_idx), lora_b, scale, magnitude)
            d = ratio(magnitude, norm)
        flat = ids if ids.dim() == 1 else ids.reshape(-1)
        how = scale, g, padding_idx
        trained = lora_a_t.requires_grad or lora_b.requires_grad or (d is not None and d.requires_grad)
        if (torch.is_grad_enabled() and trained) or (
            not torch.compiler.is_compiling() and outlived(flat, weight, lora_a_t, lora_b, d)
        ):
            y = apply(LoRAEmbeddingFunction, flat, weight, lora_a_t, lora_b, d, factor, how)
        else:
            y, _ = _forward(Table(flat, weight, lora_a_t, lora_b, d, factor, *how), False)
    return y if ids.dim() == 1 else y.view(*ids.shape, weight.shape[1])


class LoRAEmbeddingFunction(torch.autograd.Function):
    """The autograd Function of `lora_embedding`. It saves ids, h [M, R] only if B or d needs a gradient, and references
    to the operands. With DoRA, E[ids] is looked up again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        w: Tensor,
        a_t: Tensor,
        b: Tensor,
        d: Tensor | None,
        factor: Tensor | None,
        how: tuple[float, float, int | None],
    ) -> Tensor:
        """Return y [M, D]. `how` is (scale, embed_scale, padding_idx)."""
        _, _, _, need_db, need_dd, *_ = ctx.needs_input_grad
        save_h = need_db or need_dd
        y, h = _forward(Table(ids, w, a_t, b, d, factor, *how), save_h)
        ctx.save_for_backward(ids, w, a_t, b, d, factor, h if save_h else None)
        ctx.how = how
        return y

    @staticmethod
    @keeps_hooks
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of a_t, b and d, and None for each that is not needed."""
        grads = gradients_of("lora_embedding", ctx, dy, _gradients)
        return *grads, None, None


def _forward(table: Table, save_h: bool) -> tuple[Tensor, Tensor | None]:
    """Return (y, h), through the registered operator where something observes the call."""
    way = embedding_operators if watched(table.ids, table.w, table.a_t, table.b, table.d) else embedding_passes
    return way.forward(table, save_h)


def _gradients(  # type: ignore[no-untyped-def]
    ctx: Any, dy: Tensor, ids, w, a_t, b, d, factor, h
) -> tuple[Tensor | None, ...]:
    """Return (None, None, da_t, db, dd), and None for each that is not needed."""
    _, _, need_da, need_db, need_dd, *_ = ctx.needs_input_grad
    dy = as_dense(dy, w.dtype)
    way = embedding_operators if watched(dy, w, a_t, b, d) else embedding_passes
    needs = need_da, need_db, need_dd
    found = way.backward(dy, Table(ids, w, a_t, b, d, factor, *ctx.how), h, needs)
    return None, None, *[each if need else None for each, need in zip(found, needs, strict=True)]


def _needs_plain(ids: Tensor, *operands: Any) -> bool:
    """Return whether plain torch operations serve a call: it is recorded to run elsewhere, is transformed, has
    tangents, or an operand is of a subclass that knows torch's operators only, such as DTensor."""
    if torch.compiler.is_compiling():
        return plain.is_exporting()
    if plain.is_tracing() or _transforms_active():
        return True
    tensors = [t for t in (ids, *operands) if isinstance(t, Tensor)]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return True
    return any(type(t) not in PLAIN and plain._dispatches(t) for t in tensors)


def _plain(
    ids: Tensor,
    w: Tensor,
    a_t: Tensor,
    b: Tensor,
    scale: float | Tensor,
    embed_scale: float | Tensor,
    padding_idx: int | None,
    magnitude: Tensor | None,
) -> Tensor:
    """Return y as torch computes it."""
    scale, b = check.scale(scale, b)
    rows = F.embedding(ids, without_row(a_t, padding_idx))
    y = F.embedding(ids, w)
    with no_autocast(device_type(w)):
        z = y + (rows @ b.t()) * scale
        if magnitude is not None:
            a_t, b = without_row(a_t, padding_idx).detach(), b.detach()
            whole = w.detach().to(torch.promote_types(a_t.dtype, torch.float32)) + scale * (a_t @ b.t())
            norm = torch.linalg.vector_norm(whole, dim=0).to(magnitude.dtype)
            z = z * ratio(magnitude, norm.clamp_min(torch.finfo(magnitude.dtype).smallest_normal))
        if isinstance(embed_scale, Tensor):
            embed_scale = embed_scale.detach().to(w.dtype)
        return (z * embed_scale).to(w.dtype)


def _row(padding_idx: int, V: int) -> int:
    """Return padding_idx as a number from 0 on. Raises ValueError where the table has no such row."""
    if not -V <= padding_idx < V:
        raise ValueError(f"padding_idx must be a row of the table of {V} rows, got {padding_idx}")
    return padding_idx % V


def _fit(V: int, D: int, V_of_a: int, R: int, D_of_b: int, R_of_b: int) -> bool:
    """Return whether [V, D], [V, R] and [D, R] are the sizes of E, Aᵀ and B."""
    return V_of_a == V and D_of_b == D and R_of_b == R and V > 0 and D > 0 and R > 0


def _check(
    ids: Tensor, w: Tensor, a_t: Tensor, b: Tensor, embed_scale: float | Tensor, magnitude: Tensor | None
) -> None:
    """Raise TypeError or ValueError where the operands do not fit together."""
    dtype = a_t.dtype
    if ids.dtype not in _IDS:
        raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
    if w.dtype not in check.DTYPES:
        raise TypeError(f"weight must be fp64, fp32, fp16 or bf16, got {w.dtype}")
    if b.dtype != dtype or not (dtype == w.dtype or (dtype == torch.float32 and w.dtype in check.HALVES)):
        raise TypeError(
            "lora_a_t and lora_b must both have weight's dtype, or both fp32 beside an fp16 or bf16 weight; "
            f"got weight {w.dtype}, lora_a_t {dtype}, lora_b {b.dtype}"
        )
    sizes = *w.shape, *a_t.shape, *b.shape  # whole shapes take torch microseconds to compare
    if len(sizes) != 6 or not (w.dim() == a_t.dim() == 2 and _fit(*sizes)):
        raise ValueError(
            "weight must be [V, D], lora_a_t [V, R] and lora_b [D, R], each at least 1; got "
            f"weight {tuple(w.shape)}, lora_a_t {tuple(a_t.shape)}, lora_b {tuple(b.shape)}"
        )
    if isinstance(embed_scale, Tensor) and embed_scale.numel() != 1:
        raise ValueError(f"an embed_scale must have one element, got shape {tuple(embed_scale.shape)}")
    operands = {"ids": ids, "weight": w, "lora_a_t": a_t, "lora_b": b}
    if magnitude is not None:
        operands["magnitude"] = magnitude
        if magnitude.shape != w.shape[1:]:
            raise ValueError(f"magnitude must be [D] beside a weight {tuple(w.shape)}, got {tuple(magnitude.shape)}")
        if magnitude.dtype not in (dtype, torch.float32) or (dtype == torch.float64 != magnitude.dtype):
            raise TypeError(f"magnitude must have lora_a_t's dtype ({dtype}), or fp32; got {magnitude.dtype}")
    if any(t.device != w.device for t in operands.values()):
        raise ValueError(
            "operands lie on different devices: " + ", ".join(f"{name} on {t.device}" for name, t in operands.items())
        )
