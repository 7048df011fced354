"""Ways to split W [N, K] into a frozen base and the first values of an adapter s·B A, with A [r, K] and B [N, r].

    pissa     W = W_res + s·B A, B A the principal r singular triplets
              (Meng, Wang and Zhang, "PiSSA", 2024, arXiv:2404.02948)
    milora    W = W_res + s·B A, B A the last r singular triplets
              (Wang, Li, Chen, Lin, Luo, Wang and Zhao, "MiLoRA", 2024, arXiv:2406.09044)
    olora     W = W_res + s·B A, B A of the QR decomposition
              (Büyükakyüz, "OLoRA", 2024, arXiv:2406.01775)
    loftq     W ≈ Q + s·B A, Q in 4 or 8 bits
              (Li, Yu, Liang, He, Karampatziakis, Chen and Zhao, "LoftQ", 2023, arXiv:2310.08659)
    lq_lora   W ≈ Q + s·B A, with the low-rank part computed first and errors optionally weighted by the Fisher
              information
              (Guo, Greengard, Xing and Kim, "LQ-LoRA", 2023, arXiv:2311.12023)

`lora_kernels.nn.init_gradient` has LoRA-GA, which splits W by a gradient.

All of them take W in fp32, bf16 or fp16 on any device that has fp64, leave it as it is, and return new tensors on that
device. They compute in fp32. Only W - s·B A is computed in fp64, from A and B as they are returned, so that W_res makes
up for the rounding of an A and B in 16 bits. Most of the working memory is the SVD's: six to nine copies of a square W
in fp32 with the exact SVD, three to five with the randomised one and in `olora`.

The SVD is exact unless `niter` is given. Then it is randomised, as in `torch.svd_lowrank(W, r, niter)`, with `niter`
subspace iterations (Halko, Martinsson and Tropp, "Finding structure with randomness", arXiv:0909.4061). That is much
faster for a large W and a small r. Its random numbers come from a generator of its own with a fixed seed, so every call
gives the same result. The largest element of each row of Vᵀ is made positive: two runs give the same bits, and two
machines the same signs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lora_kernels.nn.low_rank import Part, Weights, difference, factors, finite, minus, norm
from lora_kernels.nn.merging import row_blocks
from lora_kernels.quant.weight import DTYPES, QuantizedWeight, quantize_weight


@torch.no_grad()
def pissa(
    w: Tensor, r: int, scale: float, *, niter: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (W_res, A, B) with A = √(S/s) Vᵀ and B = U √(S/s) for the r largest singular values of W = U S Vᵀ, and
    W_res = W - s·B A.

    Args:
        w: W [N, K].
        r: the rank, 1 to min(N, K).
        scale: s, positive.
        niter: the number of subspace iterations of the randomised SVD; None for the exact SVD.
        dtype: the dtype of A and B: fp32, bf16 or fp16.

    W_res has W's dtype. From the exact SVD, s·B A is the best approximation of W of rank r (Eckart and Young), whatever
    s is.

    Raises:
        TypeError: the dtype of W, or `dtype`, is none of these.
        ValueError: W is not a matrix or not finite; r, scale or niter is out of range; a result overflows.
    """
    part = Part(r, scale, niter, dtype)
    exact = checked(w, part)
    a, b = factors(exact, part)
    return finite("W - s·B A", minus(exact, a, b, scale, w.dtype)), a, b


@torch.no_grad()
def milora(w: Tensor, r: int, scale: float, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return (W_res, A, B) with A = √(S/s) Vᵀ and B = U √(S/s) for the r smallest of the min(N, K) singular values of
    W = U S Vᵀ, and W_res = W - s·B A.

    W_res keeps what W does most, and the adapter trains the directions that W uses least. The SVD is exact, because a
    randomised one finds the largest values only.

    `pissa` documents the arguments and the dtypes.

    Raises:
        TypeError, ValueError: as `pissa`; ValueError where these r singular values are zero up to rounding. A and B
            would both start at zero then, and neither would get a gradient.
    """
    part = Part(r, scale, None, dtype)
    exact = checked(w, part)
    a, b = factors(exact, part, last=True)
    largest, size = scale * a[0].double().square().sum().item(), norm(exact)
    if largest <= torch.finfo(torch.float32).eps * size:
        raise ValueError(
            f"the last {r} singular values of this weight {tuple(w.shape)} are zero up to rounding (at most "
            f"{largest:.3g} beside ‖W‖ = {size:.3g}), so A and B would start at zero and never train. Take a larger r, "
            "or another init"
        )
    return finite("W - s·B A", minus(exact, a, b, scale, w.dtype)), a, b


@torch.no_grad()
def olora(w: Tensor, r: int, scale: float, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return (W_res, A, B) with W = Q R, B the first r columns of Q, A the first r rows of R, and W_res = W - s·B A.

    Neither A nor B contains s, as in PEFT 0.19: B is orthonormal whatever s is, and W_res depends on s. B and the first
    r columns of A depend on the first r columns of W only, so only these are factorised; the rest of A is Bᵀ W.

    `pissa` documents the arguments, the dtypes and what is raised.
    """
    exact = checked(w, Part(r, scale, None, dtype))
    q, triangle = torch.linalg.qr(exact[:, :r])
    right = torch.zeros(r, exact.shape[1] - r, dtype=torch.float64, device=exact.device)
    for rows in row_blocks(exact.shape[0]):  # in fp64, because TF32 may replace fp32 in a product
        right.addmm_(q[rows].T.double(), exact[rows, r:].double())
    a, b = finite("A", torch.cat([triangle, right.float()], dim=1).to(dtype)), q.to(dtype).contiguous()
    return finite("W - s·B A", minus(exact, a, b, scale, w.dtype)), a, b


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
    """Return (Q, A, B, norms) of LoftQ's Algorithm 1, which starts from A₀ = B₀ = 0 and alternates

        Q_t = quantised(W - s·B_{t-1} A_{t-1}),   s·B_t A_t = SVD_r(W - Q_t).

    A_t and B_t contain √(S/s) each. norms[t - 1] is the Frobenius norm of W - Q_t - s·B_t A_t.

    The SVD step is the best one for its Q. Quantising is no projection, since its grid moves with the absmax of every
    block, so the alternation is a heuristic and the norm may rise. The iterate with the smallest norm is therefore
    returned, the first one where several have it: `norms.index(min(norms))`. The first iterate is already no worse than
    quantising W alone.

    Args:
        w, r, scale, niter, dtype: as in `pissa`.
        format, blocksize, double_quant, scaling: as in `quantize_weight`, which gets W - s·B A in fp32. Q has W's dtype
            as the one that it dequantises to by default; the norms are those of Q in fp32.
        iterations: the number of iterates, at least 1.

    Raises:
        TypeError, ValueError: as `pissa` and `quantize_weight`; ValueError for fewer than 1 iterations.
    """
    part = Part(r, scale, niter, dtype)
    exact = checked(w, part, iterations)
    quantise = partial(quantize_weight, format=format, blocksize=blocksize, double_quant=double_quant, scaling=scaling)
    norms: list[float] = []
    a, b = exact.new_zeros(r, exact.shape[1]), exact.new_zeros(exact.shape[0], r)
    for _ in range(iterations):
        q = quantise(minus(exact, a, b, scale))
        gap = difference(exact, q)
        a, b = factors(gap, part)
        norms.append(norm(minus(gap, a, b, scale)))
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
    """Return (Q, A, B, errors) of LQ-LoRA's decomposition, which starts from Q₀ = 0 and alternates

        s·B_t A_t = SVD_r(W - Q_{t-1}),   Q_t = quantised(W - s·B_t A_t)

    until the error ‖W - Q_t - s·B_t A_t‖_F stops falling.

    With `fisher` = (row, column), and D_row and D_col their diagonal matrices, the low-rank part is
    D_row⁻¹ SVD_r(D_row (W - Q) D_col) D_col⁻¹ and the error is ‖D_row (W - Q - s·B A) D_col‖_F, which this SVD
    minimises. Where F has rank 1, that is the paper's ‖√F ⊙ (W - Q - s·B A)‖_F up to a constant.

    errors[t - 1] is the error of iterate t, for every iterate that was computed. If the last error did not fall, the
    iterate before it is returned: `errors.index(min(errors))`. (The authors' code returns the last and worse one.)

    Args:
        w, r, scale, niter, dtype, format, blocksize, double_quant, scaling: as in `loftq`.
        iterations: the largest number of iterates, at least 1. The error may fall for dozens of them, but it falls most
            in the first ten.
        fisher: row [N] and column [K], positive: the means of √F over the rows and columns of the diagonal Fisher
            information F [N, K] of W, or the roots of the means of F. A common factor does not change Q, A and B.

    Raises:
        TypeError, ValueError: as `loftq`; ValueError for a `fisher` of another shape, or one that is not positive and
            finite.
    """
    part = Part(r, scale, niter, dtype)
    exact = checked(w, part, iterations)
    weights, unit = (None, 1.0) if fisher is None else _weights(fisher, exact)
    quantise = partial(quantize_weight, format=format, blocksize=blocksize, double_quant=double_quant, scaling=scaling)
    errors: list[float] = []
    gap = exact
    for _ in range(iterations):
        a, b = factors(gap, part, weights)
        rest = minus(exact, a, b, scale)
        q = quantise(rest)
        errors.append(unit * norm(difference(rest, q), weights))
        del rest  # frees its memory for the next SVD
        if len(errors) > 1 and errors[-1] >= errors[-2]:
            break
        best = replace(q, dtype=w.dtype), a, b
        gap = difference(exact, q)
    return *best, errors


def checked(w: Tensor, part: Part, iterations: int = 1) -> Tensor:
    """Return W in fp32. Raises TypeError and ValueError for arguments that no scheme takes."""
    r, scale, niter, dtype = part
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


def _weights(fisher: tuple[Tensor, Tensor], w: Tensor) -> tuple[Weights, float]:
    """Return the row and column weights of W in fp32, divided by their means, and the product of the two means. With
    mean 1, products of the weights neither overflow nor vanish."""
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
