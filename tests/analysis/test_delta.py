"""`delta_svd` is the singular value decomposition of ΔW, found without it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.analysis.delta import delta_svd


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(n: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(n, k, seed=seed))[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K", "r"), [(33, 47, 5), (47, 33, 1), (7, 40, 12), (40, 7, 12), (1, 9, 1), (3, 1, 2)])
def test_the_decomposition_is_that_of_the_product(N, K, r, dtype):
    a, b, scale = random(r, K, dtype=dtype), random(N, r, seed=1, dtype=dtype), -1.7
    u, s, v = delta_svd(a, b, scale)
    delta = scale * b.double() @ a.double()
    k = min(r, N, K)
    eye = torch.eye(k, dtype=torch.float64)
    assert (u.shape, s.shape, v.shape) == ((N, k), (k,), (K, k))
    torch.testing.assert_close(s, torch.linalg.svdvals(delta)[:k], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((u * s) @ v.T, delta, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(v.T @ v, eye, rtol=0, atol=1e-12)


def test_planted_singular_values_and_vectors_are_found():
    N, K, r = 96, 80, 6
    want = torch.logspace(1, -4, r, dtype=torch.float64)
    left, right = orthonormal(N, r, 1), orthonormal(K, r, 2)
    mix = random(r, r, seed=3)
    u, s, v = delta_svd(torch.linalg.solve(mix, (want[:, None] * right.T) / 2), left @ mix, 2.0)
    torch.testing.assert_close(s, want, rtol=1e-9, atol=0)
    torch.testing.assert_close((u * left).sum(0).abs(), torch.ones(r, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close((v * right).sum(0).abs(), torch.ones(r, dtype=torch.float64), rtol=0, atol=1e-9)


def test_singular_values_made_of_rounding_errors_are_zero():
    a, b = random(4, 30), random(20, 4, seed=1)
    assert delta_svd(torch.cat([a, a]), torch.cat([b, b], 1)).rank == 4
    assert delta_svd(torch.cat([a, a]), torch.cat([b, -b], 1)).rank == 0  # the update and its negative
    assert delta_svd(a, torch.zeros(20, 4)).rank == 0
    assert delta_svd(a, b, 0.0).rank == 0
    assert delta_svd(a, b * 1e-200).rank == 4


def test_rows_that_are_long_because_their_columns_are_short_hide_no_other():
    a, b, length = random(4, 30), random(20, 4, seed=1), torch.tensor([1e-9, 1.0, 1e4, 1e9], dtype=torch.float64)
    _, s, _ = delta_svd(length[:, None] * a, b / length)
    torch.testing.assert_close(s, delta_svd(a, b).s, rtol=1e-12, atol=0)
    silent = torch.cat([a, 1e30 * a[:1]]), torch.cat([b, torch.zeros(20, 1)], 1)  # no column, however long the row
    torch.testing.assert_close(delta_svd(*silent).s[:4], delta_svd(a, b).s, rtol=1e-12, atol=0)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor):
                self.most = max(self.most, made.numel())
        return out


def test_the_update_itself_is_never_made():
    a, b = random(4, 300), random(200, 4)
    with Largest() as seen:
        delta_svd(a, b, 0.5)
    assert 0 < seen.most <= 300 * 4


@pytest.mark.parametrize("where", ["a", "b", "scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(where, value):
    a, b, scale = random(2, 5), random(4, 2), 1.0
    if where == "scale":
        scale = value
    else:
        {"a": a, "b": b}[where][1, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        delta_svd(a, b, scale)


@pytest.mark.parametrize(("a", "b"), [((2, 5), (4, 3)), ((2, 5, 1), (4, 2)), ((0, 5), (4, 0)), ((5,), (4, 2))])
def test_shapes_that_do_not_fit_are_refused(a, b):
    with pytest.raises(ValueError, match=r"are not \[r, K\] and \[N, r\]"):
        delta_svd(torch.zeros(a), torch.zeros(b))
