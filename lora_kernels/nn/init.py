"""Adapters that start from W itself: W [N,K] taken apart into what is frozen and s·B A, with A [r,K] and B [N,r].

    pissa     W = W_res + s·B A, B A the principal r singular triplets
              (Meng, Wang and Zhang, "PiSSA", arXiv:2404.02948)
    olora     W = W_res + s·B A, B A of the QR decomposition
              (Büyükakyüz, "OLoRA", arXiv:2406.01775)
    loftq     W ≈ Q + s·B A, Q in 4 or 8 bits
              (Li, Yu, Liang, He, Karampatziakis, Chen and Zhao, "LoftQ", arXiv:2310.08659)
    lq_lora   the same, with the low-rank part first and, if wished, errors weighted by the Fisher information
              (Guo, Greengard, Xing and Kim, "LQ-LoRA", arXiv:2311.12023)

All take W in fp32, bf16 or fp16 on any device that has fp64, leave it as it is and give new tensors there. Everything
is computed in fp32, and W - s·B A in fp64 from A and B as they are returned, so that what an A and B in 16 bits lose is
in W_res. The working memory is mostly the SVD's: six to nine copies of a square W in fp32 with the exact one, three to
five with the randomised one and in `olora`.

The SVD is exact unless `niter` is given. Then it is that of `torch.svd_lowrank(W, r, niter)`: randomised, with `niter`
subspace iterations (Halko, Martinsson and Tropp, "Finding structure with randomness", arXiv:0909.4061), much faster for
a large W and a small r, and the same at every call, since it draws from a generator of its own with a fixed seed. The
largest element of each row of Vᵀ is made positive: two runs give the same bits, and two machines the same signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.nn.merging import row_blocks, updated_weight
from lora_kernels.quant.weight import DTYPES, QuantizedWeight, quantize_weight

_SEED = 0
"""Of the randomised SVD."""

_Weights = tuple[Tensor, Tensor]


@torch.no_grad()
def pissa(
    w: Tensor, r: int, scale: float, *, niter: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(W_res, A, B) with A = √(S/s) Vᵀ and B = U √(S/s) of the r largest singular values of W = U S Vᵀ, and
    W_res = W - s·B A.

    Args:
        w: W [N, K].
        r: the rank, 1 to min(N, K).
        scale: s, positive.
        niter: None for the exact SVD; else the number of subspace iterations of the randomised one.
        dtype: of A and B: fp32, bf16 or fp16.

    W_res has W's dtype. From the exact SVD, s·B A is the best approximation of W of rank r (Eckart and Young), whatever
    s is.

    Raises TypeError for another dtype; ValueError for a w that is not a matrix or not finite, an r, scale or niter out
    of range, and results that overflow.
    """
    exact = _checked(w, r, scale, dtype, niter)
    a, b = _factors(exact, r, scale, niter, dtype)
    return _finite("W - s·B A", _minus(exact, a, b, scale, w.dtype)), a, b


@torch.no_grad()
def olora(w: Tensor, r: int, scale: float, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(W_res, A, B) with B = the first r columns of Q, A = the first r rows of R, of W = Q R, and W_res = W - s·B A.

    Neither A nor B holds s, as in PEFT 0.19: B is orthonormal whatever s is, and W_res depends on s. Only the first r
    columns of W are factorised, which is all that they depend on; the rest of A is Bᵀ W.

    Arguments, dtypes and what is raised are `pissa`'s.
    """
    exact = _checked(w, r, scale, dtype)
    q, triangle = torch.linalg.qr(exact[:, :r])
    right = torch.zeros(r, exact.shape[1] - r, dtype=torch.float64, device=exact.device)
    for rows in row_blocks(exact.shape[0]):  # in fp64, which is never TF32
        right.addmm_(q[rows].T.double(), exact[rows, r:].double())
    a, b = _finite("A", torch.cat([triangle, right.float()], dim=1).to(dtype)), q.to(dtype).contiguous()
    return _finite("W - s·B A", _minus(exact, a, b, scale, w.dtype)), a, b


@torch.no_grad()
def loftq(
    w: Tensor,
    r: int,
    scale: float,
    *,
    format: str = "nf4",
    iterations: int = 5,
    blocksize: int = 64,
    double_quant: bool = False,
    scaling: str = "row",
    niter: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[QuantizedWeight, Tensor, Tensor, list[float]]:
    """(Q, A, B, norms) of LoftQ's Algorithm 1: from A₀ = B₀ = 0, in turn

        Q_t = quantised(W - s·B_{t-1} A_{t-1}),   s·B_t A_t = SVD_r(W - Q_t),

    A_t and B_t with √(S/s) each. norms[t - 1] is the Frobenius norm of W - Q_t - s·B_t A_t.

    The SVD step is the best one for its Q, but quantising is no projection (its grid moves with the absmax of every
    block), so that the alternation is a heuristic and the norm may rise. Returned is therefore the iterate of the
    smallest norm, the first of them: `norms.index(min(norms))`. Already the first iterate is no worse than
    quantising W alone.

    Args:
        w, r, scale, niter, dtype: as in `pissa`.
        format, blocksize, double_quant, scaling: as in `quantize_weight`, which takes W - s·B A in fp32. Q carries W's
            dtype, as that which it dequantises to by default; the norms are of Q in fp32.
        iterations: at least 1.

    Raises what `pissa` and `quantize_weight` raise; ValueError for fewer than 1 iterations.
    """
    exact = _checked(w, r, scale, dtype, niter, iterations)
    settings: dict[str, Any] = {"blocksize": blocksize, "double_quant": double_quant, "scaling": scaling}
    norms: list[float] = []
    a, b = exact.new_zeros(r, exact.shape[1]), exact.new_zeros(exact.shape[0], r)
    for _ in range(iterations):
        q = quantize_weight(_minus(exact, a, b, scale), format, **settings)
        gap = _gap(exact, q)
        a, b = _factors(gap, r, scale, niter, dtype)
        norms.append(_norm(_minus(gap, a, b, scale)))
        if norms.index(min(norms)) == len(norms) - 1:
            best = replace(q, dtype=w.dtype), a, b
    return *best, norms


@torch.no_grad()
def lq_lora(
    w: Tensor,
    r: int,
    scale: float,
    *,
    format: str = "nf4",
    iterations: int = 100,
    fisher: tuple[Tensor, Tensor] | None = None,
    blocksize: int = 64,
    double_quant: bool = False,
    scaling: str = "row",
    niter: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[QuantizedWeight, Tensor, Tensor, list[float]]:
    """(Q, A, B, errors) of LQ-LoRA's decomposition: from Q₀ = 0, in turn

        s·B_t A_t = SVD_r(W - Q_{t-1}),   Q_t = quantised(W - s·B_t A_t),

    until the error ‖W - Q_t - s·B_t A_t‖_F stops falling. With `fisher` = (row, column) and D the diagonal matrices of
    them, the low-rank part is D_row⁻¹ SVD_r(D_row (W - Q) D_col) D_col⁻¹, and the error
    ‖D_row (W - Q - s·B A) D_col‖_F: that which this SVD minimises, and up to a constant the paper's
    ‖√F ⊙ (W - Q - s·B A)‖_F where F has rank 1.

    errors[t - 1] is the error of iterate t, for every one that was run. The last one, if it did not fall, is not
    returned, but the one before it: `errors.index(min(errors))`. (The authors' code returns the worse one.)

    Args:
        w, r, scale, niter, dtype, format, blocksize, double_quant, scaling: as in `loftq`.
        iterations: at most so many, at least 1. Dozens may pass before the error rises; most of its fall is in the
            first ten.
        fisher: row [N] and column [K], positive: the means of √F over the rows and columns of the diagonal Fisher
            information F [N, K] of W, or the roots of the means of F. A common factor does not matter to Q, A and B.

    Raises what `loftq` raises; ValueError for weights of another shape, or that are not positive and finite.
    """
    exact = _checked(w, r, scale, dtype, niter, iterations)
    weights, unit = (None, 1.0) if fisher is None else _weights(fisher, exact)
    settings: dict[str, Any] = {"blocksize": blocksize, "double_quant": double_quant, "scaling": scaling}
    errors: list[float] = []
    gap = exact
    for _ in range(iterations):
        a, b = _factors(gap, r, scale, niter, dtype, weights)
        rest = _minus(exact, a, b, scale)
        q = quantize_weight(rest, format, **settings)
        errors.append(unit * _norm(_gap(rest, q), weights))
        del rest  # before the next SVD
        if len(errors) > 1 and errors[-1] >= errors[-2]:
            break
        best = replace(q, dtype=w.dtype), a, b
        gap = _gap(exact, q)
    return *best, errors


def _checked(
    w: Tensor, r: int, scale: float, dtype: torch.dtype, niter: int | None = None, iterations: int = 1
) -> Tensor:
    """W in fp32, if everything is as it must be."""
    if w.dtype not in DTYPES or dtype not in DTYPES:
        raise TypeError(
            f"the weight and the adapter made from it must be fp32, bf16 or fp16, got {w.dtype} and {dtype}"
        )
    if w.dim() != 2:
        raise ValueError(f"the weight must be [N, K] to make an adapter from it, got {tuple(w.shape)}")
    if not 1 <= r <= min(w.shape):
        raise ValueError(
            f"r must lie between 1 and min(N, K) = {min(w.shape)} for an adapter made from a weight {tuple(w.shape)}, "
            f"got {r}"
        )
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite for an adapter made from the weight, got {scale}")
    if niter is not None and niter < 0:
        raise ValueError(f"niter must be at least 0, or None for the exact SVD, got {niter}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    bad = w.isfinite().logical_not_()
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{int(bad.sum())} of the {w.numel()} elements of the weight are NaN or infinite, the first of them "
            f"{w[first].item()} at {first}: no adapter can be made from it"
        )
    return w.detach().float()


def _weights(fisher: tuple[Tensor, Tensor], w: Tensor) -> tuple[_Weights, float]:
    """The row and column weights of W in fp32 with mean 1, so that their products neither overflow nor vanish, and the
    factor that was taken out."""
    unit, made = 1.0, []
    for name, weight, size in zip(("row", "column"), fisher, w.shape, strict=True):
        if weight.shape != (size,):
            raise ValueError(
                f"fisher must be the weights of the rows [N] and of the columns [K] of a weight {tuple(w.shape)}, "
                f"got {name} {tuple(weight.shape)}"
            )
        weight = weight.detach().to(w.device, torch.float64)
        mean = weight.mean().item()
        normal = (weight / mean).float()
        if not (normal.isfinite() & (normal > 0)).all() or mean <= 0:
            raise ValueError(
                f"the {name} weights of fisher must be positive and finite, since the low-rank part is divided by them;"
                f" got {weight.min().item():.4g} to {weight.max().item():.4g}: give them a smallest value with clamp"
            )
        unit *= mean
        made.append(normal)
    return (made[0], made[1]), unit


def _factors(
    e: Tensor, r: int, scale: float, niter: int | None, dtype: torch.dtype, weights: _Weights | None = None
) -> tuple[Tensor, Tensor]:
    """A and B in `dtype` with s·B A = SVD_r(E), or the weighted one."""
    if weights is not None:
        e = _weighted(e.clone(), weights)
    u, s, vt = _svd(e, r, niter)
    root = (s / scale).sqrt_()
    a, b = root[:, None] * vt, u * root
    if weights is not None:
        a, b = a / weights[1], b / weights[0][:, None]
    return _finite("A", a.to(dtype)), _finite("B", b.to(dtype))


def _svd(e: Tensor, r: int, niter: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, r], S [r] and Vᵀ [r, K] of the r largest singular values of E [N, K]."""
    if niter is None:
        u, s, vt = torch.linalg.svd(e, full_matrices=False)
        u, s, vt = u[:, :r], s[:r], vt[:r]
    elif e.shape[0] < e.shape[1]:
        v, s, ut = _fast_svd(e.T, r, niter)
        u, vt = ut.T, v.T
    else:
        u, s, vt = _fast_svd(e, r, niter)
    largest = vt.gather(1, vt.abs().argmax(1, keepdim=True))[:, 0]
    sign = torch.ones_like(largest).copysign(largest)
    return u * sign, s, vt * sign[:, None]


def _fast_svd(e: Tensor, r: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_svd` of an E with N ≥ K, of its part in the space that `niter` iterations find for the columns."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randn(e.shape[1], r, generator=generator, dtype=torch.float32, device="cpu").to(e.device)
    with torch.autocast(e.device.type, enabled=False):
        x = torch.linalg.qr(e @ drawn).Q
        for _ in range(niter):
            x = torch.linalg.qr(e.T @ x).Q
            x = torch.linalg.qr(e @ x).Q
        u, s, vt = torch.linalg.svd(x.T @ e, full_matrices=False)
        return x @ u, s, vt


def _minus(w: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """W - s·B A in `dtype`, rounded once."""
    return updated_weight(w.__getitem__, a, b, -scale, dtype)


def _gap(w: Tensor, q: QuantizedWeight) -> Tensor:
    """W - Q in fp32."""
    held = q.dequantize(torch.float32)
    return torch.sub(w, held, out=held)


def _weighted(e: Tensor, weights: _Weights) -> Tensor:
    """D_row E D_col, in place."""
    return e.mul_(weights[0][:, None]).mul_(weights[1])


def _norm(e: Tensor, weights: _Weights | None = None) -> float:
    """‖E‖_F, or ‖D_row E D_col‖_F; E is overwritten."""
    if weights is not None:
        e = _weighted(e, weights)
    rows = torch.linalg.vector_norm(e, dim=1)
    return torch.linalg.vector_norm(rows.double()).item()


def _finite(name: str, made: Tensor) -> Tensor:
    """`made`, contiguous, unless it overflows."""
    if not made.isfinite().all():
        raise ValueError(f"{name} overflows {made.dtype}: take fp32, a scale nearer to 1, or scale the weight down")
    return made.contiguous()


_DENSE: dict[str, Callable[..., Any]] = {"pissa": pissa, "olora": olora}
_QUANTISED: dict[str, Callable[..., Any]] = {"loftq": loftq, "lq_lora": lq_lora}


def split_named(init: str, quant: str | None) -> Callable[..., Any] | None:
    """The function of this file that `init` names, for a dense base (`quant` is None) or a quantised one; None for
    "kaiming", which splits nothing. Raises ValueError for a name there is none of, or of the other kind of base."""
    ways = _DENSE if quant is None else _QUANTISED
    if init == "kaiming" or init in ways:
        return ways.get(init)
    if init not in {**_DENSE, **_QUANTISED}:
        names = ", ".join(map(repr, ("kaiming", *_DENSE, *_QUANTISED)))
        raise ValueError(f"unknown init {init!r}: one of {names}")
    if quant is None:
        raise ValueError(f'init={init!r} splits W into a quantised base and an adapter: give quant="nf4", or another')
    raise ValueError(
        f"init={init!r} is for a dense base, and quant={quant!r}: take {' or '.join(map(repr, _QUANTISED))}"
    )
