"""`write_sums`: W + Σ s·B A over several updates, computed by blocks and rounded once.

    W₀ = W      Wᵢ = Wᵢ₋₁ + sᵢ·Bᵢ Aᵢ      with DoRA  Wᵢ = dᵢ ⊙ (Wᵢ₋₁ + sᵢ·Bᵢ Aᵢ),  dᵢ = mᵢ / ‖W + sᵢ·Bᵢ Aᵢ‖

Every W here is a stack [G, P, Q] as it is stored: a matrix is a stack of one, and a module that stores Wᵀ has P = K.
The update of a stack is the product of a left [G, P, R] and a right [G, R, Q].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.nn import merging

_BLOCK, _BLOCK_ON_A_GPU = 1 << 19, 1 << 24
"""The number of elements that are computed at a time, which bounds the temporaries."""

Rows = Callable[[int, slice], Tensor]
"""A function that returns the rows in a slice of one matrix of the stack, in any dtype."""


class Term(NamedTuple):
    """One update of a stack, left · right · scale."""

    left: Tensor
    """[G, P, R]"""
    right: Tensor
    """[G, R, Q]"""
    scale: float
    magnitude: Tensor | None = None
    """DoRA's m, with as many elements as the stack has rows, or columns if it holds Wᵀ; None for another update."""
    turned: bool = False
    """Whether the stack holds Wᵀ, so that m belongs to its columns."""


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the sums of W, A and B: fp32 if torch makes products of fp32 in fp32, else fp64."""
    if tensors[0].device.type == "mps":
        return torch.float32
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the precision was set for a single back-end
        exact = False
    return torch.float32 if exact and not any(t.dtype == torch.float64 for t in tensors) else torch.float64


def write_sums(out: Tensor, rows: Rows, terms: Sequence[Term], wide: torch.dtype) -> None:
    """Write the sum of W and `terms` into `out` [G, P, Q], rounded to its dtype once. ``rows`` reads W, and `wide` is
    the dtype of the sums. The memory besides is that of one block."""
    parts = [term._replace(left=_as(term.left, out, wide), right=_as(term.right, out, wide)) for term in terms]
    factors = [None if term.magnitude is None else _factor(out, rows, term, wide) for term in parts]
    spare = torch.empty(0, dtype=wide, device=out.device)
    for g, block in _blocks(out):
        into = out[g, block]
        total = into if out.dtype == wide and into.is_contiguous() else spare.resize_(into.shape)
        w = rows(g, block)
        if w.dtype == wide and parts:
            first = parts[0]
            torch.addmm(w, first.left[g, block], first.right[g], alpha=first.scale, out=total)
        else:
            total.copy_(w)
        for i, (term, d) in enumerate(zip(parts, factors, strict=True)):
            if i or w.dtype != wide:
                total.addmm_(term.left[g, block], term.right[g], alpha=term.scale)
            if d is not None:
                total.mul_(d if term.turned else d[block, None])
        if total is spare:
            into.copy_(total)


def _as(t: Tensor, out: Tensor, wide: torch.dtype) -> Tensor:
    return t.detach().to(out.device, wide)


def _factor(out: Tensor, rows: Rows, term: Term, wide: torch.dtype) -> Tensor:
    """Return DoRA's d = m / ‖W + s·B A‖, where the norms of a stack of Wᵀ are those of its columns."""
    squares = torch.zeros(out.shape[2 if term.turned else 1], dtype=merging.wide_dtype(out.device), device=out.device)
    for g, block in _blocks(out):
        total = torch.addmm(rows(g, block).to(wide), term.left[g, block], term.right[g], alpha=term.scale)
        if term.turned:
            squares += total.square().sum(0, dtype=squares.dtype)
        else:
            squares[block] = total.square().sum(1, dtype=squares.dtype)
    assert term.magnitude is not None
    return (term.magnitude.detach().to(out.device).reshape(-1) / squares.sqrt()).to(wide)


def _blocks(out: Tensor) -> list[tuple[int, slice]]:
    """Return the places of the blocks of a stack [G, P, Q]: the number of the matrix, and its rows."""
    G, P, Q = out.shape
    rows = max(1, (_BLOCK if out.device.type == "cpu" else _BLOCK_ON_A_GPU) // max(1, Q))
    return [(g, slice(first, min(P, first + rows))) for g in range(G) for first in range(0, P if Q else 0, rows)]
