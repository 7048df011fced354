"""LoftQ and LQ-LoRA agree with the papers' definitions in fp64 and with PEFT, and lower the error of quantising."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.initialise_weights import ALTERNATING, EPS, WEIGHTS, codes, gaussian, norm, product, same, truncated

from lora_kernels.nn.init import loftq, lq_lora, olora, pissa
from lora_kernels.quant.weight import quantize_weight

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = ("nf4", "fp4", "int8", "fp8")


@pytest.mark.parametrize("iterations", [1, 3])
def test_base_and_adapter_of_loftq_are_those_of_peft(iterations, monkeypatch):
    """PEFT's LoftQ runs on the CPU if bitsandbytes seems to have no 4-bit layers. It has no scale, so s is 1 here."""
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
    assert norms.index(min(norms)) == iterations - 1  # PEFT returns the last iterate
    torch.testing.assert_close(q.dequantize(), theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(product(a, b, 1.0), product(their_a, their_b, 1.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", WEIGHTS)
def test_loftq_is_algorithm_1(make, format):
    """Every iterate follows from the iterate before it by the paper's step, which the test computes in fp64."""
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
        assert t == 1 or norms[-1] < norms[-2]  # the norm falls on these weights, so the last iterate was returned


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", WEIGHTS)
def test_lq_lora_is_the_papers_algorithm(make, format):
    w, r, scale = make(96, 128), 4, 2.0
    gap = w.double()
    for t in range(1, 5):
        q, a, b, errors = lq_lora(w, r, scale, format=format, iterations=t)
        assert len(errors) == t and errors.index(min(errors)) == t - 1
        # s·B A is the SVD of the previous gap, and Q is W - s·B A, quantised.
        assert norm(gap - product(a, b, scale)) == pytest.approx(norm(gap - truncated(gap, r)), rel=1e-5)
        argument = (w.double() - product(a, b, scale)).float()
        assert all(map(torch.equal, codes(q), codes(quantize_weight(argument, format))))
        gap = w.double() - q.dequantize().double()
        assert errors[-1] == pytest.approx(norm(gap - product(a, b, scale)), rel=1e-5)


@pytest.mark.parametrize("make", WEIGHTS)
def test_fisher_weights_make_the_weighted_error_the_least(make):
    """Each low-rank part is the best one in the weighted norm, and the low-rank part of plain LQ-LoRA is not."""
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
def test_the_errors_fall_below_that_of_quantising_alone(make, format):
    w = make(128, 192)
    plain = norm(w - quantize_weight(w, format).dequantize())
    for r, less in ((1, 0.999), (16, 0.9)):
        for niter in (None, 2):
            norms = loftq(w, r, 2.0, format=format, niter=niter)[3]
            assert norms[0] < less * plain and norms == sorted(norms, reverse=True) and len(set(norms)) == len(norms)
            errors = lq_lora(w, r, 2.0, format=format, niter=niter, iterations=10)[3]
            assert min(errors) < less * plain


@pytest.mark.parametrize("make", WEIGHTS)
def test_the_settings_of_the_format_are_kept(make):
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


def test_the_iterate_of_the_smallest_norm_is_returned():
    """With few elements and a rank that nearly spans them, the norm falls and rises."""
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
def test_the_result_has_the_least_error_of_its_list(N, K, share, scale, format, magnitude, seed, niter):
    """LoftQ's error is also no larger than that of quantising alone."""
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
def test_every_dtype_and_the_least_and_largest_rank(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = gaussian(32, 48).to(dtype)
        kept = w.clone()
        for r in (1, 32):
            q, a, b, norms = ALTERNATING[name](w, r, 0.5, iterations=2, dtype=dtype)
            assert q.dtype == q.dequantize().dtype == dtype and a.dtype == b.dtype == dtype
            assert q.check().shape == (32, 48) and a.shape == (r, 48) and b.shape == (32, r)
            left = norm(w.double() - q.dequantize(torch.float32).double() - product(a, b, 0.5))
            # the norm is that of A and B as they are returned
            assert min(norms) == pytest.approx(left, rel=1e-5, abs=50 * EPS * norm(w))
        assert torch.equal(w, kept)
