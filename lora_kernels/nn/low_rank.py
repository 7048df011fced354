"""The low-rank part s·B A of a matrix, and the matrix without it: steps that `lora_kernels.nn.init` combines."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.nn.merging import updated_weight
from lora_kernels.quant.weight import QuantizedWeight

_SEED = 0
"""The seed of the randomised SVD."""

Weights = tuple[Tensor, Tensor]
"""The weights of the rows [N] and of the columns [K] of an error."""


class Part(NamedTuple):
    """The settings of a low-rank part s·B A. They are the arguments of `lora_kernels.nn.init.pissa`."""

    r: int
    scale: float
    niter: int | None = None
    dtype: torch.dtype = torch.float32


def factors(e: Tensor, part: Part, weights: Weights | None = None, last: bool = False) -> tuple[Tensor, Tensor]:
    """Return A and B with s·B A = SVD_r(E), or with `weights` = D the weighted D_row⁻¹ SVD_r(D_row E D_col) D_col⁻¹.
    With `last` they are of the r smallest singular values in the place of the largest."""
    r, scale, niter, dtype = part
    if weights is not None:
        e = _weighted(e.clone(), weights)
    u, s, vt = svd(e, r, niter, last)
    root = (s / scale).sqrt_()
    a, b = root[:, None] * vt, u * root
    if weights is not None:
        a, b = a / weights[1], b / weights[0][:, None]
    return finite("A", a.to(dtype)), finite("B", b.to(dtype))


def svd(e: Tensor, r: int, niter: int | None, last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [N, r], S [r] and Vᵀ [r, K] for the r largest singular values of E [N, K], from large to small, or with
    `last` for the r smallest, for which niter is None."""
    if niter is None:
        u, s, vt = torch.linalg.svd(e, full_matrices=False)
        kept = slice(-r, None) if last else slice(r)
        u, s, vt = u[:, kept], s[kept], vt[kept]
    elif e.shape[0] < e.shape[1]:
        v, s, ut = _fast_svd(e.T, r, niter)
        u, vt = ut.T, v.T
    else:
        u, s, vt = _fast_svd(e, r, niter)
    largest = vt.gather(1, vt.abs().argmax(1, keepdim=True))[:, 0]
    sign = torch.ones_like(largest).copysign(largest)
    return u * sign, s, vt * sign[:, None]


def _fast_svd(e: Tensor, r: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the randomised SVD of E [N, K], for N ≥ K: U, S and Vᵀ of E projected on the column space that `niter`
    iterations find."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randn(e.shape[1], r, generator=generator, dtype=torch.float32, device="cpu").to(e.device)
    with torch.autocast(e.device.type, enabled=False):
        x = torch.linalg.qr(e @ drawn).Q
        for _ in range(niter):
            x = torch.linalg.qr(e.T @ x).Q
            x = torch.linalg.qr(e @ x).Q
        u, s, vt = torch.linalg.svd(x.T @ e, full_matrices=False)
        return x @ u, s, vt


def minus(w: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return W - s·B A in `dtype`, rounded once."""
    return updated_weight(w.__getitem__, a, b, -scale, dtype)


def difference(w: Tensor, q: QuantizedWeight) -> Tensor:
    """Return W - Q in fp32."""
    held = q.dequantize(torch.float32)
    return torch.sub(w, held, out=held)


def _weighted(e: Tensor, weights: Weights) -> Tensor:
    """Return D_row E D_col, computed in place."""
    return e.mul_(weights[0][:, None]).mul_(weights[1])


def norm(e: Tensor, weights: Weights | None = None) -> float:
    """Return ‖E‖_F, or with weights ‖D_row E D_col‖_F, which overwrites E."""
    if weights is not None:
        e = _weighted(e, weights)
    rows = torch.linalg.vector_norm(e, dim=1)
    return torch.linalg.vector_norm(rows.double()).item()


def finite(name: str, made: Tensor) -> Tensor:
    """Return `made` as a contiguous tensor. Raises ValueError where it has overflowed."""
    if not made.isfinite().all():
        raise ValueError(f"{name} overflows {made.dtype}: take fp32, a scale nearer to 1, or scale the weight down")
    return made.contiguous()
