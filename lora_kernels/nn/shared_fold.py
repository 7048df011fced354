"""B' = v ⊙ B ⊙ u of a layer with shared factors, kept between two forwards that change nothing.

It is kept in evaluation only, on a CPU, and for a frozen B. On a GPU it takes less time to compute B' than to find out
whether it still holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.shared import folded
from lora_kernels.ops.watched import watched


class KeptFold(NamedTuple):
    """B' and what it was made of."""

    place: tuple[object, ...]
    """Where B was, its layout, and how often it had been written to."""
    u: Tensor
    """A copy of u."""
    v: Tensor
    """A copy of v."""
    folded: Tensor
    """B' [N, R]."""


def kept_fold(kept: KeptFold | None, x: Tensor, b: Tensor, u: Tensor, v: Tensor) -> KeptFold | None:
    """Return `kept` where it holds for u, v and the first rows of `b`, as many as v has, or else a new fold; None where
    none may be kept in this call.

    u and v are compared by their values. B [N, R] is too large for that: a fold is stale when B has been written to,
    has been replaced or moved, or has another dtype. A write through ``B.data``, of which torch keeps no record, is not
    noticed until the layer runs in training mode.
    """
    if not isinstance(x, Tensor) or torch.is_grad_enabled() or b.requires_grad:  # torch.fx records with another x
        return None
    if watched(x, b, u, v, None) or not b.is_cpu or b.is_inference():
        return None
    place = (b.data_ptr(), b._version, b.dtype, b.shape, b.stride())
    if kept is not None and kept.place == place and _same(kept.u, u) and _same(kept.v, v):
        return kept
    with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be used outside of it
        u, v = u.detach().clone(), v.detach().clone()
        return KeptFold(place, u, v, folded(b.detach()[: len(v)], u, v))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
