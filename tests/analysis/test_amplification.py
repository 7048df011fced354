"""The amplification factor, its two references, and intruder dimensions, against full decompositions in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_kernels import quantize_weight
from lora_kernels.analysis import amplification, intruder_dimensions, subspace_similarity, weight_similarity
from lora_kernels.analysis.frozen import FrozenWeight


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(n: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(n, k, seed=seed))[0]


def problem(N: int, K: int, r: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return random(N, K, dtype=dtype), random(r, K, seed=1, dtype=dtype), random(N, r, seed=2, dtype=dtype)


def by_definition(w: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[float, float]:
    """Return ‖ΔW‖ and ‖UᵀWV‖ from ΔW itself."""
    delta = scale * b.double() @ a.double()
    u, _, vt = torch.linalg.svd(delta, full_matrices=False)
    core = u[:, : len(a)].T @ w.double() @ vt[: len(a)].T
    return torch.linalg.matrix_norm(delta).item(), torch.linalg.matrix_norm(core).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K", "r"), [(45, 33, 5), (33, 45, 1), (530, 600, 3)])
def test_the_factor_is_that_of_the_definition(N, K, r, dtype):
    w, a, b = problem(N, K, r, dtype)
    got = amplification(w, a, b, 0.7)
    delta, projected = by_definition(w, a, b, 0.7)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert got.rank == r
    assert got.delta_norm == pytest.approx(delta, rel=1e-10)
    assert got.projected == pytest.approx(projected, rel=tolerance)
    assert got.factor == pytest.approx(delta / projected, rel=tolerance)
    assert got.weight_norm == pytest.approx(torch.linalg.matrix_norm(w.double()).item(), rel=tolerance)
    top = torch.linalg.svdvals(w.double())[:r].norm().item()
    if min(N, K) <= 512:
        assert got.projected_top == pytest.approx(top, rel=tolerance)
    else:
        assert 0.94 * top <= got.projected_top <= top * (1 + 1e-6)


def test_planted_directions_have_their_factor():
    """W holds σ on the update's own direction, so the factor is s·‖BA‖/σ."""
    u, v, sigma = orthonormal(50, 6, 1), orthonormal(40, 6, 2), torch.tensor([9.0, 7.0, 5.0, 3.0, 0.5, 0.25])
    w = (u * sigma) @ v.T
    got = amplification(w, v[:, 4:].T, u[:, 4:] * 3, 2.0)
    assert got.projected == pytest.approx(math.hypot(0.5, 0.25), rel=1e-6)
    assert got.factor == pytest.approx(6 * math.sqrt(2) / math.hypot(0.5, 0.25), rel=1e-6)
    assert got.projected_top == pytest.approx(math.hypot(9, 7), rel=1e-6)


def test_the_random_reference_is_the_mean_square_over_random_directions():
    w, a, b = problem(40, 30, 4)
    squares = [
        torch.linalg.matrix_norm(orthonormal(40, 4, 2 * i).T @ w @ orthonormal(30, 4, 2 * i + 1)).item() ** 2
        for i in range(400)
    ]
    want = amplification(w, a, b, 1.0).projected_random
    assert want == pytest.approx(w.norm().item() * 4 / math.sqrt(40 * 30), rel=1e-12)
    assert (sum(squares) / 400) ** 0.5 == pytest.approx(want, rel=0.05)


def test_the_numbers_of_the_papers_table_7_follow_from_the_formulas():
    """Hu et al., 2021, table 7: W_q of layer 48 of GPT-3, 12288×12288, ‖W‖ = 61.95."""
    N = K = 12288
    at_4, at_64 = (61.95 * r / math.sqrt(N * K) for r in (4, 64))
    assert round(at_4, 2) == 0.02
    # 0.323, where the paper prints 0.33. One draw scatters around it: ‖UᵀWV‖² sums r² squares, with a relative
    # deviation of about √2/r, so 0.33, from 0.325 on, lies within one standard deviation.
    assert abs(at_64 - 0.33) < 0.005 + at_64 / (math.sqrt(2) * 64)
    assert round(6.91 / 0.32, 1) == 21.6  # the paper prints 21.5, from numbers with more digits
    # The same by `amplification`, on a weight and an update that are made to have these norms.
    u, v = orthonormal(96, 8, 1), orthonormal(96, 8, 2)
    w = (u[:, :4] * (0.32 / 2)) @ v[:, :4].T
    w += (61.95**2 - 0.32**2) ** 0.5 / 2 * u[:, 4:] @ v[:, 4:].T
    got = amplification(w, v[:, :4].T, u[:, :4] * (6.91 / 2), 1.0)
    assert (got.weight_norm, got.delta_norm, got.projected) == pytest.approx((61.95, 6.91, 0.32), rel=1e-9)
    assert round(got.factor, 1) == 21.6


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
def test_a_quantised_weight_is_measured_as_its_values(format, monkeypatch):
    w, a, b = problem(1100, 600, 4, torch.float32)
    q = quantize_weight(w, format)
    seen = []
    rows = type(q).rows
    monkeypatch.setattr(type(q), "rows", lambda self, *args: seen.append(args[1] - args[0]) or rows(self, *args))
    got, want = amplification(q, a, b, 0.5), amplification(q.dequantize(torch.float32), a, b, 0.5)
    assert got.projected == pytest.approx(want.projected, rel=1e-5)
    assert got.projected_top == pytest.approx(want.projected_top, rel=1e-4)
    assert got.weight_norm == pytest.approx(want.weight_norm, rel=1e-5)
    assert 0 < max(seen[:-1]) <= 512  # the last call is that of dequantize


def test_the_reference_of_the_weight_can_be_left_out():
    got = amplification(*problem(20, 30, 2), 1.0, top=False)
    assert got.projected_top is None and got.factor > 0


def test_an_update_of_zero_has_no_factor():
    w, a, b = problem(20, 30, 2)
    got = amplification(w, a, b * 0, 1.0)
    assert (got.rank, got.delta_norm, got.projected, got.projected_top, got.projected_random) == (0, 0, 0, 0, 0)
    assert math.isnan(got.factor)
    assert amplification(w * 0, a, b, 1.0).factor == math.inf


@pytest.mark.parametrize(("N", "K"), [(40, 60), (60, 40), (700, 560)])
def test_leading_vectors_of_the_weight(N, K):
    s = torch.arange(1, min(N, K) + 1, dtype=torch.float64) ** -1.0
    u, v = orthonormal(N, min(N, K), 1), orthonormal(K, min(N, K), 2)
    w = (u * s) @ v.T
    for transposed in (False, True):
        got = FrozenWeight(w.T.contiguous() if transposed else w, transposed).leading(5)
        torch.testing.assert_close(got.s, s[:5], rtol=1e-6, atol=0)
        torch.testing.assert_close((got.v * v[:, :5]).sum(0).abs(), torch.ones(5).double(), rtol=0, atol=1e-5)


def test_a_weight_of_low_rank_has_no_more_than_its_values():
    w = (random(700, 10) @ random(10, 600, seed=1)).float()
    got, want = FrozenWeight(w).leading(16).s, torch.linalg.svdvals(w.double())[:16]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=want[0].item() * 1e-6)


@pytest.mark.parametrize(("N", "K"), [(40, 30), (30, 40), (560, 600)])
def test_directions_that_a_weight_of_low_rank_does_not_have_are_not_compared(N, K):
    w, a, b = random(N, 3) @ random(3, K, seed=3), *problem(N, K, 4)[1:]
    for dtype in (torch.float64, torch.float32):
        phi = weight_similarity(w.to(dtype), a, b, k=5)
        assert phi[:3].isfinite().all()
        assert phi[3:].isnan().all()
    assert weight_similarity(torch.zeros(N, K), a, b).isnan().all()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e30])
def test_the_size_of_the_weight_does_not_matter(size):
    w, a, b = problem(45, 33, 5, torch.float32)
    got, want = amplification(size * w, a, b, 0.7), amplification(w, a, b, 0.7)
    for name in ("weight_norm", "projected", "projected_top", "projected_random"):
        assert getattr(got, name) == pytest.approx(size * getattr(want, name), rel=1e-5), name


def test_phi_of_the_weight_and_the_update_is_that_of_their_vectors():
    w, a, b = problem(40, 30, 4)
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    want = subspace_similarity((torch.diag(s[:6]) @ vt[:6], u[:, :6]), (a, b))
    torch.testing.assert_close(weight_similarity(w, a, b, k=6), want, rtol=0, atol=1e-9)
    assert weight_similarity(w, a, b).shape == (4, 4)


@pytest.mark.parametrize(("N", "K"), [(40, 55), (55, 40), (48, 48)])
def test_intruder_dimensions_are_those_of_two_full_decompositions(N, K):
    w, a, b = problem(N, K, 2)
    for scale in (0.05, 0.4, 3.0):
        u = torch.linalg.svd(w, full_matrices=False)[0]
        tuned = torch.linalg.svd(w + scale * b @ a, full_matrices=False)[0][:, :10]
        got = intruder_dimensions(w, a, b, scale)
        assert got.cosines == pytest.approx((u.T @ tuned).abs().amax(0).tolist(), abs=1e-8)
        assert got.count == int(((u.T @ tuned).abs().amax(0) < 0.5).sum())
    assert intruder_dimensions(w, a, b, 0.0).count == 0
    assert intruder_dimensions(w, a, b, 100.0, k=2).count == 2
    assert intruder_dimensions(quantize_weight(w.float(), "int8"), a, b, 100.0, k=2).count == 2


def test_a_direction_that_the_weight_lacks_is_an_intruder():
    u, v = orthonormal(30, 6, 1), orthonormal(30, 6, 2)
    w = (u[:, :5] * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]).double()) @ v[:, :5].T
    new, known = (v[:, 5:].T, 9 * u[:, 5:]), (v[:, 4:5].T, 9 * u[:, 4:5])
    assert intruder_dimensions(w, *new, 1.0, k=3).count == 1
    assert intruder_dimensions(w, *known, 1.0, k=3).count == 0


def test_what_does_not_fit_is_refused():
    w, a, b = problem(20, 30, 2)
    with pytest.raises(ValueError, match=r"\(30, 20\) does not go with A \(2, 30\) and B \(20, 2\)"):
        amplification(w.T, a, b, 1.0)
    with pytest.raises(ValueError, match="flatten"):
        amplification(torch.zeros(20, 10, 3), a, b, 1.0)
    with pytest.raises(ValueError, match="meta device"):
        amplification(w.to("meta"), a, b, 1.0)
    with pytest.raises(TypeError, match="no floating type"):
        amplification(w.to(torch.uint8), a, b, 1.0)
    with pytest.raises(ValueError, match="k=0"):
        intruder_dimensions(w, a, b, 1.0, k=0)
    w[3, 4] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        amplification(w, a, b, 1.0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        intruder_dimensions(w, a, b, 1.0)
