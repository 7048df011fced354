"""Adapters made from the weight: the papers' definitions in fp64, PEFT's results, guarantees."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_kernels.initialise import loftq, lq_lora, olora, pissa
from lora_kernels.quant import QuantizedWeight, quantize_weight

DENSE = {"pissa": pissa, "pissa niter": lambda *args, **kw: pissa(*args, niter=4, **kw), "olora": olora}
ALTERNATING = {"loftq": loftq, "lq_lora": lq_lora}
FORMATS = ("nf4", "fp4", "int8", "fp8")
SHAPES = [(96, 160), (160, 96), (128, 128), (1100, 24)]  # the last in several slices of rows
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices as small as these gain nothing from more, and on a busy machine they wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gaussian(N: int, K: int) -> Tensor:
    return torch.randn(N, K) * 0.02


def heavy_tailed(N: int, K: int) -> Tensor:
    """Student's t with three degrees of freedom: outliers set the absmax of their blocks."""
    return torch.randn(N, K) * 0.02 / (torch.randn(3, N, K).square().mean(0)).sqrt()


def low_rank_and_noise(N: int, K: int) -> Tensor:
    return torch.randn(N, 16) @ torch.randn(16, K) * 0.02 + torch.randn(N, K) * 0.01


WEIGHTS = (gaussian, heavy_tailed, low_rank_and_noise)


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return scale * b.double() @ a.double()


def norm(e: Tensor) -> float:
    return torch.linalg.matrix_norm(e.double()).item()


def truncated(e: Tensor, r: int) -> Tensor:
    """SVD_r(E) in fp64."""
    u, s, vt = torch.linalg.svd(e.double(), full_matrices=False)
    return u[:, :r] * s[:r] @ vt[:r]


def codes(q: QuantizedWeight) -> list[Tensor]:
    return [t.view(torch.uint8) for t in q.tensors]


def same(results: tuple, others: tuple) -> bool:
    """Two results of one function, in every bit."""

    def leaves(results: tuple) -> Iterator[Tensor | list[float]]:
        for part in results:
            yield from codes(part) if isinstance(part, QuantizedWeight) else [part]

    return all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for x, y in zip(leaves(results), leaves(others), strict=True)
    )


# --- the dense ones ---


@pytest.mark.parametrize("scale", [1.0, 0.37, 16.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DENSE)
def test_the_parts_sum_to_the_weight(name, shape, scale):
    w = gaussian(*shape)
    for r in (1, 8, min(shape)):
        rest, a, b = DENSE[name](w, r, scale)
        assert a.shape == (r, shape[1]) and b.shape == (shape[0], r) and a.dtype == b.dtype == torch.float32
        assert all(t.is_contiguous() and not t.requires_grad for t in (rest, a, b))
        sums = (
            2 * (r + 2) * 2.0**-53 * (w.double().abs() + product(a.abs(), b.abs(), scale))
        )  # in fp64: theirs and ours
        rounding = EPS / 2 * rest.double().abs() + sums
        assert ((rest.double() + product(a, b, scale) - w.double()).abs() <= rounding).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DENSE)
def test_the_parts_sum_to_a_weight_in_16_bits(name, dtype):
    """Rounded once, to W's dtype, whatever that of A and B is: the rounding of A and B is in W_res."""
    w = gaussian(96, 160).to(dtype)
    for adapter in (torch.float32, dtype):
        rest, a, b = DENSE[name](w, 8, 2.0, dtype=adapter)
        assert rest.dtype == dtype and a.dtype == b.dtype == adapter
        exact = w.double() - product(a, b, 2.0)
        assert ((rest.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 2.0**-24).all()
    assert (rest.float() - DENSE[name](w, 8, 2.0)[0].float()).abs().max() > 0  # the 16 bits of A and B were seen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", WEIGHTS)
def test_pissa_is_the_best_approximation(make, shape):
    """Eckart and Young: what is left has the norm of the tail of the singular values, and their largest as its own."""
    w = make(*shape)
    s = torch.linalg.svdvals(w.double())
    for r in (1, 8, min(shape) - 1):
        rest, a, b = pissa(w, r, 2.0)
        left = w.double() - product(a, b, 2.0)
        allowed = 8 * EPS * s[0].item()
        assert norm(left) == pytest.approx(s[r:].norm().item(), rel=1e-5, abs=allowed)
        assert torch.linalg.matrix_norm(left, 2).item() == pytest.approx(s[r].item(), rel=1e-5, abs=allowed)
        torch.testing.assert_close(torch.linalg.svdvals(rest.double())[: -r or None], s[r:], rtol=1e-4, atol=allowed)


def test_pissa_spreads_each_singular_value_evenly():
    w = gaussian(96, 160)
    s = torch.linalg.svdvals(w.double())[:8]
    for niter in (None, 200):
        _, a, b = pissa(w, 8, 0.5, niter=niter)
        for gram in (a.double() @ a.double().T, b.double().T @ b.double()):
            torch.testing.assert_close(gram, torch.diag(s / 0.5), rtol=1e-3, atol=1e-3 * s[0].item())
        largest = a.gather(1, a.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()


def test_more_iterations_of_the_fast_svd_come_nearer():
    w = gaussian(200, 160)
    best = norm(pissa(w, 8, 1.0)[0])
    left = [norm(pissa(w, 8, 1.0, niter=niter)[0]) / best - 1 for niter in (0, 2, 8, 100)]
    assert left == sorted(left, reverse=True) and left[0] > 0.01 and abs(left[3]) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_the_qr_decomposition(shape):
    w = gaussian(*shape)
    q, triangle = torch.linalg.qr(w.double())
    for r in (1, 8, min(shape)):
        _, a, b = olora(w, r, 3.0)
        torch.testing.assert_close(b.double(), q[:, :r], rtol=0, atol=1e-4)
        torch.testing.assert_close(a.double(), triangle[:r], rtol=0, atol=1e-4 * w.norm().item())
        torch.testing.assert_close(b.double().T @ b.double(), torch.eye(r).double(), rtol=0, atol=1e-5)
        assert torch.equal(a[:, :r].tril(-1), torch.zeros(r, r))
        if r == min(shape):
            torch.testing.assert_close(product(a, b, 1.0), w.double(), rtol=0, atol=1e-6)


# --- PEFT ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora"])
def test_equals_peft(name, shape, monkeypatch):
    peft = pytest.importorskip("peft")

    def seeded(*args, **kwargs):  # what `pissa` draws from, whatever the global seed is
        torch.manual_seed(0)
        return torch.svd_lowrank(*args, **kwargs)

    monkeypatch.setattr("peft.tuners.lora.layer.svd_lowrank", seeded)
    linear = nn.Linear(shape[1], shape[0], bias=False)
    w = linear.weight.detach().clone()
    for alpha in (8, 20):
        linear.weight.data.copy_(w)
        config = peft.LoraConfig(r=8, lora_alpha=alpha, target_modules=["0"], init_lora_weights=name)
        layer = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
        scale = layer.scaling["default"]
        torch.manual_seed(1)
        rest, a, b = olora(w, 8, scale) if name == "olora" else pissa(w, 8, scale, niter=4 if "niter" in name else None)
        theirs = product(layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach(), scale)
        allowed = 100 * EPS * norm(theirs)
        torch.testing.assert_close(product(a, b, scale), theirs, rtol=0, atol=allowed)
        torch.testing.assert_close(rest, layer.base_layer.weight.detach(), rtol=0, atol=allowed)


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_equals_peft(iterations, monkeypatch):
    """PEFT's LoftQ runs on the CPU where bitsandbytes has no 4 bits. It knows no scale: that is s = 1."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("scipy")
    from peft.utils import loftq_utils

    if not hasattr(loftq_utils, "NFQuantizer"):
        pytest.skip("this PEFT has no NF4 of its own: its LoftQ needs a GPU")
    monkeypatch.setattr(loftq_utils, "is_bnb_4bit_available", lambda: False)
    w = gaussian(64, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, their_a, their_b = loftq_utils.loftq_init(w, 4, 8, iterations)
    q, a, b, norms = loftq(w, 8, 1.0, iterations=iterations)
    assert norms.index(min(norms)) == iterations - 1  # PEFT returns the last
    torch.testing.assert_close(q.dequantize(), theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(product(a, b, 1.0), product(their_a, their_b, 1.0), rtol=1e-4, atol=1e-6)


# --- the quantised ones ---


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", WEIGHTS)
def test_loftq_is_algorithm_1(make, format):
    """Every step against the paper's, in fp64, from the iterate before it."""
    w, r, scale = make(96, 128), 4, 2.0
    a, b, left = torch.zeros(r, 128), torch.zeros(96, r), []
    for t in range(1, 5):
        argument = (w.double() - product(a, b, scale)).float()
        q, a, b, norms = loftq(w, r, scale, format=format, iterations=t)
        assert norms[:-1] == left and len(norms) == t
        left = norms
        assert all(map(torch.equal, codes(q), codes(quantize_weight(argument, format))))
        gap = w.double() - q.dequantize().double()
        assert norms[-1] == pytest.approx(norm(gap - product(a, b, scale)), rel=1e-5)
        assert norms[-1] == pytest.approx(norm(gap - truncated(gap, r)), rel=1e-5)
        assert t == 1 or norms[-1] < norms[-2]  # it falls on these weights, so that the last iterate is what came back


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", WEIGHTS)
def test_lq_lora_is_the_papers_algorithm(make, format):
    w, r, scale = make(96, 128), 4, 2.0
    gap = w.double()
    for t in range(1, 5):
        q, a, b, errors = lq_lora(w, r, scale, format=format, iterations=t)
        assert len(errors) == t and errors.index(min(errors)) == t - 1
        # B A is what the gap before it asks for; Q is W - s·B A, quantised.
        assert norm(gap - product(a, b, scale)) == pytest.approx(norm(gap - truncated(gap, r)), rel=1e-5)
        argument = (w.double() - product(a, b, scale)).float()
        assert all(map(torch.equal, codes(q), codes(quantize_weight(argument, format))))
        gap = w.double() - q.dequantize().double()
        assert errors[-1] == pytest.approx(norm(gap - product(a, b, scale)), rel=1e-5)


@pytest.mark.parametrize("make", WEIGHTS)
def test_fisher_weights(make):
    """Each low-rank part is the best one in the weighted norm, which the plain one is not."""
    w, r, scale = make(96, 128), 4, 2.0
    row, column = torch.rand(96) * 1e-9 + 1e-10, torch.randn(128).exp() * 1e-9
    dense = lambda e: row.double()[:, None] * e.double() * column.double()  # noqa: E731
    gap = w.double()
    for t in range(1, 4):
        q, a, b, errors = lq_lora(w, r, scale, fisher=(row, column), iterations=t)
        best = norm(dense(gap) - truncated(dense(gap), r))
        assert norm(dense(gap - product(a, b, scale))) == pytest.approx(best, rel=1e-5)
        assert norm(dense(gap - truncated(gap, r))) > 1.001 * best
        gap = w.double() - q.dequantize().double()
        assert errors[-1] == pytest.approx(norm(dense(gap - product(a, b, scale))), rel=1e-5)
    _, a, b, errors = lq_lora(w, r, scale, fisher=(row, column))
    _, plain_a, plain_b, _ = (plain := lq_lora(w, r, scale))
    assert min(errors) < norm(dense(w - plain[0].dequantize() - product(plain_a, plain_b, scale)))
    even = lq_lora(w, r, scale, fisher=(torch.full((96,), 4.0), torch.full((128,), 0.5)))
    assert same(plain[:3], even[:3]) and even[3] == [2 * error for error in plain[3]]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", WEIGHTS)
def test_norms_fall_below_quantisation_alone(make, format):
    w = make(128, 192)
    plain = norm(w - quantize_weight(w, format).dequantize())
    for r, less in ((1, 0.999), (16, 0.9)):
        for niter in (None, 2):
            norms = loftq(w, r, 2.0, format=format, niter=niter)[3]
            assert norms[0] < less * plain and norms == sorted(norms, reverse=True) and len(set(norms)) == len(norms)
            errors = lq_lora(w, r, 2.0, format=format, niter=niter, iterations=10)[3]
            assert min(errors) < less * plain


@pytest.mark.parametrize("make", WEIGHTS)
def test_double_quantisation_and_blocks(make):
    w = make(128, 192)
    kwargs = {"blocksize": 256, "double_quant": True}
    plain = quantize_weight(w, "nf4", **kwargs)
    for initialise in (loftq, lq_lora):
        q, a, b, norms = initialise(w, 8, 1.0, iterations=3, **kwargs)
        assert q.blocksize == 256 and q.nested is not None
        assert min(norms) == pytest.approx(norm(w - q.dequantize() - product(a, b, 1.0)), rel=1e-5)
        assert min(norms) < norm(w - plain.dequantize())
    q = loftq(w, 8, 1.0, format="fp8", scaling="block", iterations=1)[0]
    assert q.scales.shape == (1, 2)


def test_a_norm_that_rises():
    """Few elements and a rank that nearly spans them: the alternation goes down and up. The iterate that comes back is
    the one of the smallest norm, not the last."""
    w = torch.randn(16, 16, generator=torch.Generator().manual_seed(5))
    q, a, b, norms = loftq(w, 12, 1.0, iterations=12)
    assert norms != sorted(norms, reverse=True) and norms[-1] > min(norms)
    assert min(norms) == pytest.approx(norm(w - q.dequantize() - product(a, b, 1.0)), rel=1e-4)
    again = loftq(w, 12, 1.0, iterations=norms.index(min(norms)) + 1)
    assert same((q, a, b), again[:3]) and again[3] == norms[: len(again[3])]
    q, a, b, errors = lq_lora(w, 12, 1.0)
    assert len(errors) < 100 and errors[-1] >= errors[-2]
    assert errors[:-1] == sorted(errors[:-1], reverse=True)
    assert errors[-2] == pytest.approx(norm(w - q.dequantize() - product(a, b, 1.0)), rel=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    N=st.integers(1, 24),
    K=st.integers(1, 12).map(lambda half: 2 * half),
    share=st.floats(0, 1),
    scale=st.floats(1e-3, 1e3),
    format=st.sampled_from(FORMATS),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**32),
    niter=st.sampled_from([None, 0, 3]),
)
def test_guarantees(N, K, share, scale, format, magnitude, seed, niter):
    """What comes back is as good as the list says, no worse than anything before, and LoftQ's no worse than Q alone."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * magnitude
    r = 1 + round(share * (min(N, K) - 1))
    allowed = 50 * EPS * norm(w)
    for initialise in (loftq, lq_lora):
        q, a, b, norms = initialise(w, r, scale, format=format, iterations=4, niter=niter)
        left = norm(w.double() - q.dequantize().double() - product(a, b, scale))
        assert left == pytest.approx(min(norms), rel=1e-4, abs=allowed)
        if initialise is loftq:
            assert min(norms) <= norm(w - quantize_weight(w, format).dequantize()) + allowed
            assert len(norms) == 4
    for initialise in (olora, pissa):
        rest, a, b = initialise(w, r, scale)
        assert norm(rest.double() + product(a, b, scale) - w) <= EPS * norm(rest) + 1e-30


@pytest.mark.parametrize("name", ALTERNATING)
def test_the_weights_dtype_and_every_rank(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = gaussian(32, 48).to(dtype)
        kept = w.clone()
        for r in (1, 32):
            q, a, b, norms = ALTERNATING[name](w, r, 0.5, iterations=2, dtype=dtype)
            assert q.dtype == q.dequantize().dtype == dtype and a.dtype == b.dtype == dtype
            assert q.check().shape == (32, 48) and a.shape == (r, 48) and b.shape == (32, r)
            left = norm(w.double() - q.dequantize(torch.float32).double() - product(a, b, 0.5))
            assert min(norms) == pytest.approx(
                left, rel=1e-5, abs=50 * EPS * norm(w)
            )  # of A and B as they are returned
        assert torch.equal(w, kept)


# --- the same every time ---

ALL = {
    "pissa": lambda w: pissa(w, 8, 2.0),
    "pissa niter": lambda w: pissa(w, 8, 2.0, niter=3),
    "olora": lambda w: olora(w, 8, 2.0),
    "loftq": lambda w: loftq(w, 8, 2.0, iterations=2),
    "loftq niter": lambda w: loftq(w, 8, 2.0, iterations=2, niter=3),
    "lq_lora": lambda w: lq_lora(w, 8, 2.0, iterations=2),
    "lq_lora fisher": lambda w: lq_lora(w, 8, 2.0, iterations=2, fisher=(w.detach()[:, 0].exp(), w.detach()[0].exp())),
}


@pytest.mark.parametrize("name", ALL)
def test_two_runs_give_the_same_bits(name, poison):
    w = low_rank_and_noise(96, 160)
    w.requires_grad_()
    state, kept = torch.get_rng_state(), w.detach().clone()
    first = ALL[name](w)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global generator
    torch.randn(5)
    assert same(first, ALL[name](w)) and torch.equal(w, kept)
    assert not any(t.requires_grad for t in first if isinstance(t, Tensor))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert same(first, ALL[name](w))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", DENSE)
def test_the_layout_is_rounding(name):
    w = low_rank_and_noise(96, 160)
    for one, other in zip(ALL[name](w), ALL[name](torch.empty(160, 96).T.copy_(w)), strict=True):
        assert other.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * one.abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_the_number_of_threads_is_rounding(name):
    """The signs of the singular vectors are fixed. A code at a boundary may change with the rounding, and with it a
    little of everything that comes after: the norms hardly."""
    w = low_rank_and_noise(257, 320)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ALL[name](w))
    if name not in DENSE:
        assert results[0][3] == pytest.approx(results[1][3], rel=1e-4)
        return
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * one.abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_a_weight_of_zeros_and_one_of_too_low_a_rank(name):
    for w in (torch.zeros(24, 16), torch.randn(24, 2) @ torch.randn(2, 16)):
        rest, a, b, *_ = ALL[name](w)
        rest = rest.dequantize() if isinstance(rest, QuantizedWeight) else rest
        left = norm(w.double() - rest.double() - product(a, b, 2.0))
        assert a.isfinite().all() and b.isfinite().all() and left <= 0.1 * norm(w)
