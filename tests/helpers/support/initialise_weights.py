"""Weights to initialise adapters from, and the fp64 computations that a decomposition is compared with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_kernels.nn.init import loftq, lq_lora, milora, olora, pissa
from lora_kernels.quant.weight import QuantizedWeight

DENSE = {
    "pissa": pissa,
    "pissa niter": lambda *args, **kw: pissa(*args, niter=4, **kw),
    "milora": milora,
    "olora": olora,
}
ALTERNATING = {"loftq": loftq, "lq_lora": lq_lora}
EPS = torch.finfo(torch.float32).eps


def gaussian(N: int, K: int) -> Tensor:
    return torch.randn(N, K) * 0.02


def heavy_tailed(N: int, K: int) -> Tensor:
    """Return samples of Student's t with three degrees of freedom, whose outliers set the absmax of their blocks."""
    return torch.randn(N, K) * 0.02 / (torch.randn(3, N, K).square().mean(0)).sqrt()


def low_rank_and_noise(N: int, K: int) -> Tensor:
    return torch.randn(N, 16) @ torch.randn(16, K) * 0.02 + torch.randn(N, K) * 0.01


WEIGHTS = (gaussian, heavy_tailed, low_rank_and_noise)


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return scale * b.double() @ a.double()


def norm(e: Tensor) -> float:
    return torch.linalg.matrix_norm(e.double()).item()


def truncated(e: Tensor, r: int) -> Tensor:
    """Return SVD_r(E) in fp64."""
    u, s, vt = torch.linalg.svd(e.double(), full_matrices=False)
    return u[:, :r] * s[:r] @ vt[:r]


def codes(q: QuantizedWeight) -> list[Tensor]:
    return [t.view(torch.uint8) for t in q.tensors]


def same(results: tuple, others: tuple) -> bool:
    """Return whether two results of one function agree in every bit."""

    def leaves(results: tuple) -> Iterator[Tensor | list[float]]:
        for part in results:
            yield from codes(part) if isinstance(part, QuantizedWeight) else [part]

    return all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for x, y in zip(leaves(results), leaves(others), strict=True)
    )
