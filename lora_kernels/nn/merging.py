"""W + s·B A as a matrix of its own: computed by blocks of rows, in fp64, and rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS = 512
"""Rows made at a time: bounds the fp64 temporaries to 512 × K."""


def row_blocks(N: int) -> list[slice]:
    """The rows of a matrix [N, ·], a block at a time."""
    return [slice(n, min(N, n + _ROWS)) for n in range(0, N, _ROWS)]


def wide_dtype(device: torch.device) -> torch.dtype:
    """fp64, in which a product of 16-bit or fp32 numbers and its sum with W are exact but for the last bits; fp32 on
    Metal, which has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def updated_weight(
    rows: Callable[[slice], Tensor], a: Tensor, b: Tensor, scale: float, dtype: torch.dtype, d: Tensor | None = None
) -> Tensor:
    """d ⊙ (W + scale·B A) [N, K] in `dtype`, for a [r, K], b [N, r] and d [N] (None: ones). `rows` gives a block of the
    rows of W."""
    wide = wide_dtype(a.device)
    a, b = a.detach().to(wide), b.detach().to(wide)
    made = torch.empty(b.shape[0], a.shape[1], dtype=dtype, device=a.device)
    for block in row_blocks(b.shape[0]):
        sums = torch.addmm(rows(block).to(wide), b[block], a, alpha=scale)
        made[block] = (sums if d is None else sums.mul_(d[block, None].to(wide))).to(dtype)
    return made


def refuse_nonfinite(merged: Tensor, scale: float) -> None:
    """Raises ValueError for a merged weight that is not finite."""
    if not torch.isfinite(merged).all():
        raise ValueError(
            f"merging gives weights that are not finite (scaling {scale}): nothing was changed. "
            "Look at lora_A and lora_B"
        )
