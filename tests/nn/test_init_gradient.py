"""LoRA-GA's A and B are those of the authors' formula, and its first step follows the full gradient."""

from __future__ import annotations

import math

import pytest
import torch
from support.initialise_weights import EPS, gaussian, product, same

from lora_kernels import initialise
from lora_kernels.nn.init import pissa
from lora_kernels.nn.init_gradient import gradient_factors, lora_ga

pytestmark = pytest.mark.usefixtures("one_thread")


def falling(N: int, K: int, size: float = 1.0) -> torch.Tensor:
    """Return a gradient whose singular values fall by a third from one to the next, in fp64."""
    n = min(N, K)
    u, v = (torch.linalg.qr(torch.randn(m, n, dtype=torch.float64)).Q for m in (N, K))
    return size * u * 1.5 ** -torch.arange(n, dtype=torch.float64) @ v.T


@pytest.mark.parametrize(("N", "K", "r"), [(40, 27, 3), (27, 40, 3), (30, 30, 1), (18, 64, 4)])
@pytest.mark.parametrize("gamma", [16.0, 64.0])
def test_a_and_b_are_the_formula_in_fp64(N, K, r, gamma):
    """A = c V[:, :r]ᵀ, B = c U[:, r:2r] with c = N^¼ / √γ. A singular vector has either sign."""
    g, w, scale = falling(N, K), gaussian(N, K), 2.0
    rest, a, b = lora_ga(w, g.float(), r, scale, gamma=gamma)
    u, _, vt = torch.linalg.svd(g)
    c = N**0.25 / math.sqrt(gamma)
    for made, exact in ((a.double(), c * vt[:r]), (b.T.double(), c * u[:, r : 2 * r].T)):
        signs = (made * exact).sum(1, keepdim=True).sign()
        torch.testing.assert_close(made, signs * exact, rtol=0, atol=1e-4 * c)
    assert a.is_contiguous() and b.is_contiguous() and (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()
    exact = w.double() - product(a, b, scale)
    assert ((rest.double() - exact).abs() <= EPS / 2 * exact.abs() + 1e-15).all()
    assert torch.linalg.matrix_norm(product(a, b, scale)).item() == pytest.approx(
        scale * math.sqrt(N * r) / gamma, rel=1e-4
    )


def test_the_first_step_is_the_nearest_to_the_full_gradient_that_rank_2r_allows():
    """A step of plain gradient descent on A and B changes W by -lr·s²·(B Bᵀ G + G Aᵀ A) to first order in lr. Aᵀ A and
    B Bᵀ are projections times c², so that is the best approximation of G of rank 2r (the paper's theorem 3.1), which
    PiSSA's first step is not."""
    w, g, r, scale = gaussian(48, 36), falling(48, 36), 3, 2.0

    def first_step(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return b.double() @ b.double().T @ g + g @ a.double().T @ a.double()

    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    best = u[:, : 2 * r] * s[: 2 * r] @ vt[: 2 * r]
    _, a, b = lora_ga(w, g, r, scale)
    step = first_step(a, b)
    torch.testing.assert_close(step / (math.sqrt(48) / 16), best, rtol=0, atol=1e-4)
    _, a, b = pissa(w, r, scale)
    step = first_step(a, b)
    assert (step / torch.linalg.matrix_norm(step) - best / torch.linalg.matrix_norm(best)).norm() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_w_is_rounded_once_from_the_a_and_b_that_are_returned(dtype):
    w, g = gaussian(24, 32).to(dtype), falling(24, 32)
    for adapter in (torch.float32, dtype):
        rest, a, b = lora_ga(w, g, 2, 0.5, dtype=adapter)
        assert rest.dtype == dtype and a.dtype == b.dtype == adapter
        exact = w.double() - product(a, b, 0.5)
        assert ((rest.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 2.0**-24).all()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_size_of_the_gradient_changes_nothing(size, dtype):
    g = falling(32, 24).to(dtype)
    one = gradient_factors(g, 2)
    other = gradient_factors((g.double() * size).to(dtype), 2)
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_two_runs_give_the_same_bits_and_draw_nothing(poison):
    w, g = gaussian(40, 56), falling(40, 56)
    state = torch.get_rng_state()
    first = initialise.lora_ga(w, g, 2, 2.0)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(first, initialise.lora_ga(w, g, 2, 2.0))


def test_a_gradient_of_at_most_4r_columns_is_decomposed_exactly():
    """4r columns are all columns here, so the randomised SVD is the exact one, for a spectrum that does not fall."""
    g = torch.randn(12, 30, dtype=torch.float64)
    a, _ = gradient_factors(g, 3)
    vt = torch.linalg.svd(g, full_matrices=False).Vh[:3]
    torch.testing.assert_close(a.double().T @ a.double() / (math.sqrt(12) / 16), vt.T @ vt, rtol=0, atol=1e-4)


W = torch.ones(6, 9)


@pytest.mark.parametrize(
    ("gradient", "r", "kwargs", "message"),
    [
        (torch.ones(9, 6), 2, {}, r"shape of the weight \(6, 9\), got \(9, 6\)"),
        (torch.zeros(6, 9), 2, {}, r"gradient \(6, 9\) is zero, so it gives no adapter"),
        (torch.full((6, 9), math.nan), 2, {}, "not finite"),
        (torch.full((6, 9), math.inf), 2, {}, "not finite"),
        (torch.ones(6, 9), 2, {}, r"rank 1, and LoRA-GA takes 2r = 4 .* rows of data are few"),
        (torch.randn(6, 3) @ torch.randn(3, 9), 2, {}, "rank 3, and LoRA-GA takes 2r = 4"),
        (torch.randn(6, 9), 4, {}, r"between 1 and min\(N, K\) / 2 = 3 for a weight \(6, 9\), got 4"),
        (torch.randn(6, 9), 2, {"gamma": 0.0}, "gamma must be positive and finite, got 0.0"),
        (torch.randn(6, 9), 2, {"gamma": math.inf}, "gamma must be positive and finite, got inf"),
    ],
)
def test_a_gradient_that_gives_no_adapter_is_refused(gradient, r, kwargs, message):
    with pytest.raises(ValueError, match=message):
        lora_ga(W, gradient, r, 1.0, **kwargs)


def test_the_bad_arguments_of_every_scheme_are_refused():
    with pytest.raises(ValueError, match="scale must be positive"):
        lora_ga(W, torch.randn(6, 9), 2, 0.0)
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        lora_ga(W.double(), torch.randn(6, 9), 2, 1.0)
