"""The column norms that DoRA over an embedding divides by, computed from the table in every call.

    n = ‖E + s·Aᵀ Bᵀ‖ by columns of [V, D]

The norm is factored as that of a linear layer is (`dora_norm`, arXiv:2603.22276), with nothing of E's size beside E:

    n² = ‖E‖² + rowsum((2s·Eᵀ Aᵀ + s²·B (A Aᵀ)) ⊙ B)

On a CPU one native kernel reads E once (csrc/cpu/column_norm.cpp). Elsewhere, and for an E that it does not read, torch
computes the same sums over blocks of rows, which are contiguous in memory. Beside a batch of few ids the pass over the
whole table takes most of the time of a call. It is made in every call nevertheless, because a write through
``weight.data`` or a NumPy view leaves no trace by which a norm that was kept could be known to be stale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops import flops, registered
from lora_kernels.ops.autograd import outlived
from lora_kernels.ops.embedding_passes import native
from lora_kernels.ops.watched import watched

_ROWS, _BLOCKS = 256, 16
"""The number of rows of E in a block, which stays in a CPU's cache, and the number of blocks whose squares are added up
in fp32 before their sum is added in fp64."""


def column_norm(w: Tensor, a_t: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """Return n = ‖E + scale·Aᵀ Bᵀ‖ by columns [D] for E [V, D], Aᵀ [V, R] and B [D, R], rounded to the dtype of
    `magnitude`: the magnitude with which d = 1. A column of zeros has the dtype's smallest normal number."""
    norm_of = _run_norm
    a_t, b = a_t.detach(), b.detach()
    if watched(w, w, a_t, b, None) or outlived(w, a_t, b):  # an operator takes a tensor out of a wrapper that is dead
        flops.register()
        norm_of = _norm_op
    norm = norm_of(w, a_t, b, scale)
    return norm.to(magnitude.dtype).clamp_min(torch.finfo(magnitude.dtype).smallest_normal)


def _run_norm(w: Tensor, a_t: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return n [D] in the widest dtype of E, A and fp32."""
    wide = torch.promote_types(torch.promote_types(w.dtype, a_t.dtype), torch.float32)
    kernels = native() if w.is_cpu and wide == torch.float32 and w.stride(1) == 1 else None
    square, low, gram = _sums(w, a_t, wide) if kernels is None else kernels.column_sums(w, a_t)
    b = b.to(wide)
    low = torch.addmm(low.t(), b, gram, beta=2 * scale, alpha=scale * scale)
    norm_sq = (low * b).sum(1).add_(square)
    # Rounding may leave 0 or less where A B cancels a column, and d must stay finite.
    return torch.maximum(norm_sq, square * torch.finfo(wide).eps).sqrt_()


def _sums(w: Tensor, a_t: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return (‖E‖² by columns [D], A E [R, D], A Aᵀ [R, R]) in the dtype `wide`."""
    (V, D), R = w.shape, a_t.shape[1]
    long = wide if w.device.type == "mps" else torch.float64  # Metal has no fp64
    step = min(max(V, 1), _ROWS if w.is_cpu else _BLOCKS * _ROWS)
    squares, square = w.new_zeros(step, D, dtype=wide), w.new_zeros(D, dtype=long)
    low, gram = w.new_zeros(D, R, dtype=wide), w.new_zeros(R, R, dtype=long)
    for i, v in enumerate(range(0, V, step)):
        block, own = w[v : v + step].to(wide), a_t[v : v + step].to(wide)
        squares[: block.shape[0]].addcmul_(block, block)
        if i % _BLOCKS == _BLOCKS - 1:
            square += squares.sum(0)
            squares.zero_()
        gram += own.t() @ own
        low.addmm_(block.t(), own)
    return (square + squares.sum(0)).to(wide), low.t(), gram.to(wide)


def _fake_norm(w, a_t, b, scale):  # type: ignore
    return w.new_empty(w.shape[1], dtype=torch.promote_types(torch.promote_types(w.dtype, a_t.dtype), torch.float32))


registered.library.define("embedding_norm(Tensor w, Tensor a_t, Tensor b, float scale) -> Tensor")
registered.library.impl("embedding_norm", _run_norm, "CompositeExplicitAutograd")
torch.library.register_fake("lora_kernels::embedding_norm", _fake_norm, lib=registered.library)
_norm_op = torch.ops.lora_kernels.embedding_norm.default
