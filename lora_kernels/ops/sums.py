"""Sums beside the kernels. Under ``torch.use_deterministic_algorithms`` their bits do not depend on the number of
threads.

torch divides a sum on a CPU among its threads. Where the parts end depends on the number of threads, and so does the
order in which some columns are added up. The parts here depend on the sizes alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS, _ROWS = 1024, 30
"""The size of a part. torch computes a sum over less than 32,768 elements (at::internal::GRAIN_SIZE) on one thread."""


def fixed(t: Tensor) -> bool:
    """Return whether sums and products over `t` must not depend on the number of threads."""
    if torch.compiler.is_compiling():  # asked first: torch 2.6 cannot trace `is_cpu` in a backward
        return False
    return t.is_cpu and torch.are_deterministic_algorithms_enabled()


def column_sum(u: Tensor) -> Tensor:
    """Return Σₘ u [N] for u [M, N], in u's dtype. It is summed in fp32 at least, and rounded once."""
    if not fixed(u):
        return u.sum(0)
    wide, N = torch.promote_types(u.dtype, torch.float32), u.shape[1]
    sums = [_sum(u[:, n : n + _COLUMNS], wide) for n in range(0, N, _COLUMNS)]
    return (sums[0] if len(sums) == 1 else torch.cat(sums)).to(u.dtype)


def row_squares(u: Tensor) -> Tensor:
    """Return ‖u‖² by rows [N] for u [N, K]. On a CPU it takes memory of u's size."""
    if not u.is_cpu:
        return torch.linalg.vector_norm(u, dim=1).square_()
    if u.shape[0] == 1 and fixed(u):  # torch divides a sum with one result among its threads, but not with two
        return u.square().expand(2, -1).sum(1)[:1]
    return u.square().sum(1)  # in parts, so that its error is smaller than that of torch.linalg.vector_norm


def _sum(u: Tensor, wide: torch.dtype) -> Tensor:
    """Return Σₘ u in the dtype `wide`, for at most `_COLUMNS` columns."""
    while u.shape[0] > _ROWS:
        u = torch.stack([u[m : m + _ROWS].sum(0, dtype=wide) for m in range(0, u.shape[0], _ROWS)])
    return u.sum(0, dtype=wide)
