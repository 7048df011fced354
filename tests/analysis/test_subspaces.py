"""`subspace_similarity` is the φ(i, j) of the LoRA paper, and `random_similarity` is its mean over random subspaces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_kernels.analysis import random_similarity, subspace_similarity


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(N: int, K: int, r: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return random(r, K, seed=2 * seed, dtype=dtype), random(N, r, seed=2 * seed + 1, dtype=dtype)


def vectors(matrix: Tensor, left: bool) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u if left else vt.T


def by_definition(u: Tensor, v: Tensor, m: int, n: int) -> Tensor:
    phi = torch.empty(m, n, dtype=torch.float64)
    for i in range(1, m + 1):
        for j in range(1, n + 1):
            phi[i - 1, j - 1] = torch.linalg.matrix_norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j)
    return phi


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("r1", "r2"), [(3, 7), (7, 3), (1, 1), (4, 4)])
@pytest.mark.parametrize("of", ["delta", "A", "B"])
def test_phi_is_its_definition_on_full_decompositions(of, r1, r2, dtype):
    first, second = pair(19, 23, r1, 1, dtype), pair(19, 23, r2, 2, dtype)
    matrices = [{"delta": b.double() @ a.double(), "A": a, "B": b}[of] for a, b in (first, second)]
    want = by_definition(*(vectors(each, of == "B") for each in matrices), r1, r2)
    got = subspace_similarity(first, second, of=of)
    assert got.shape == (r1, r2) and got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_planted_subspaces_are_found():
    d, angles = 40, torch.tensor([0.1, 0.7, 1.2], dtype=torch.float64)
    q = torch.linalg.qr(random(d, 6, seed=5))[0]
    left = torch.linalg.qr(random(12, 3, seed=6))[0]
    turned = q[:, :3] * angles.cos() + q[:, 3:] * angles.sin()
    strength = torch.tensor([[5.0], [2.0], [1.0]], dtype=torch.float64)
    phi = subspace_similarity((strength * q[:, :3].T, left), (strength * turned.T, left))
    cos2 = angles.cos().square()
    want = torch.tensor([[cos2[: min(i, j)].sum() / min(i, j) for j in (1, 2, 3)] for i in (1, 2, 3)])
    torch.testing.assert_close(phi, want.double(), rtol=0, atol=1e-6)


def test_phi_is_one_minus_the_squared_projection_distance_over_p():
    u, v = (torch.linalg.qr(random(15, 4, seed=seed))[0] for seed in (1, 2))
    falling = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64))
    phi = subspace_similarity(
        (falling @ u.T, torch.linalg.qr(random(9, 4))[0]), (falling @ v.T, torch.linalg.qr(random(9, 4))[0])
    )
    for i in range(1, 5):
        for j in range(1, 5):
            sigma, p = torch.linalg.svdvals(u[:, :i].T @ v[:, :j]), min(i, j)
            distance = (p - sigma.square().sum()).sqrt()
            assert phi[i - 1, j - 1].item() == pytest.approx(1 - distance.item() ** 2 / p, abs=1e-9)


def test_phi_of_the_update_does_not_change_with_how_it_is_split():
    (a, b), second = pair(30, 25, 4, 1), pair(30, 25, 6, 2)
    t = random(4, 4, seed=9)
    split = t @ a, b @ torch.linalg.inv(t)
    torch.testing.assert_close(
        subspace_similarity(split, second), subspace_similarity((a, b), second), rtol=0, atol=1e-9
    )
    for of in ("A", "B"):  # while those of its parts do
        assert (subspace_similarity(split, second, of) - subspace_similarity((a, b), second, of)).abs().max() > 1e-3


def test_a_subspace_lies_in_itself():
    one = pair(30, 25, 5, 1)
    torch.testing.assert_close(subspace_similarity(one, one), torch.ones(5, 5).double(), rtol=0, atol=1e-12)


def test_directions_that_are_not_there_are_nan():
    a, b = pair(30, 25, 3, 1)
    doubled = torch.cat([a, a]), torch.cat([b, b], 1)  # six rows, three directions
    phi = subspace_similarity(doubled, pair(30, 25, 4, 2))
    assert phi.shape == (6, 4) and phi[:3].isfinite().all() and phi[3:].isnan().all()
    untrained = subspace_similarity((a, torch.zeros_like(b)), (a, b))
    assert untrained.isnan().all()


def test_random_subspaces_have_the_baseline_on_average():
    d, r1, r2 = 60, 3, 9
    mean = torch.zeros(r1, r2, dtype=torch.float64)
    for seed in range(60):
        mean += subspace_similarity(pair(20, d, r1, 2 * seed), pair(20, d, r2, 2 * seed + 1)) / 60
    want = random_similarity(r1, r2, d)
    assert want[0, 8].item() == want[2, 8].item() == 9 / 60 and want[2, 0].item() == 3 / 60
    # φ(1, 1) has a standard deviation of about √2/60 = 0.024 in one draw, and 0.003 in the mean of 60.
    torch.testing.assert_close(mean, want, rtol=0, atol=0.013)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="25 and 24 elements"):
        subspace_similarity(pair(30, 25, 4, 1), pair(30, 24, 4, 2))
    assert subspace_similarity(pair(30, 25, 4, 1), pair(30, 24, 4, 2), of="B").shape == (4, 4)
    with pytest.raises(ValueError, match="of='C'"):
        subspace_similarity(pair(3, 2, 1, 1), pair(3, 2, 1, 2), of="C")
    with pytest.raises(ValueError, match="from 1 to 8"):
        random_similarity(9, 2, 8)
