"""The merged weight W + s·B A, computed by blocks of rows in fp64 and rounded once, and what quantising it loses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.quant.weight import QuantizedWeight

_ROWS = 512
"""The number of rows computed at a time, which bounds the fp64 temporaries to 512 × K."""


class MergeReport(NamedTuple):
    """The cost of quantising W' = W + s·B·A into Q, in Frobenius norms."""

    error: float
    """‖Q - W'‖ / ‖W'‖."""
    update: float
    """‖s·B·A‖ / ‖W'‖. Where it is not well above `error`, most of the update is lost."""


def row_blocks(N: int) -> list[slice]:
    """Return the rows of a matrix [N, ·] as consecutive slices of at most `_ROWS`."""
    return [slice(n, min(N, n + _ROWS)) for n in range(0, N, _ROWS)]


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return fp64, or fp32 on Metal, which has no fp64. In fp64 a product of 16-bit or fp32 numbers and its sum with W
    are exact but for the last bits."""
    return torch.float32 if device.type == "mps" else torch.float64


def updated_weight(
    rows: Callable[[slice], Tensor], a: Tensor, b: Tensor, scale: float, dtype: torch.dtype, d: Tensor | None = None
) -> Tensor:
    """Return d ⊙ (W + scale·B A) [N, K] in `dtype`, for A [r, K], B [N, r] and d [N]; a d of None stands for ones.
    ``rows(block)`` returns the rows of W in the slice `block`."""
    wide = wide_dtype(a.device)
    a, b = a.detach().to(wide), b.detach().to(wide)
    made = torch.empty(b.shape[0], a.shape[1], dtype=dtype, device=a.device)
    for block in row_blocks(b.shape[0]):
        sums = torch.addmm(rows(block).to(wide), b[block], a, alpha=scale)
        made[block] = (sums if d is None else sums.mul_(d[block, None].to(wide))).to(dtype)
    return made


def refuse_nonfinite(merged: Tensor, scale: float) -> None:
    """Raise ValueError for a merged weight that is not finite."""
    if not torch.isfinite(merged).all():
        raise ValueError(
            f"merging gives weights that are not finite (scaling {scale}): nothing was changed. "
            "Look at lora_A and lora_B"
        )


def report(merged: Tensor, q: QuantizedWeight, a: Tensor, b: Tensor, scale: float) -> MergeReport:
    """Return the cost of storing `merged`, W + scale·B A in fp32, as q."""
    wide = wide_dtype(merged.device)
    a, b = a.to(wide), b.to(wide)
    error = norm = update = 0.0
    for rows in row_blocks(merged.shape[0]):
        want = merged[rows].to(wide)
        norm += want.square().sum().item()
        error += (q.rows(rows.start, rows.stop, torch.float32).to(wide) - want).square().sum().item()
        update += (b[rows] @ a).square().sum().item()
    norm = max(norm, torch.finfo(torch.float64).tiny)
    return MergeReport((error / norm) ** 0.5, abs(scale) * (update / norm) ** 0.5)
