"""PiSSA and OLoRA agree with the papers' definitions in fp64 and with PEFT. All four schemes are reproducible."""

from __future__ import annotations

import pytest
import torch
from support.initialise_weights import DENSE, EPS, WEIGHTS, gaussian, low_rank_and_noise, norm, product, same
from torch import Tensor, nn

from lora_kernels.nn.init import loftq, lq_lora, olora, pissa
from lora_kernels.quant.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(96, 160), (160, 96), (128, 128), (1100, 24)]  # the last one is computed in several blocks of rows


@pytest.mark.parametrize("scale", [1.0, 0.37, 16.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DENSE)
def test_the_parts_sum_to_the_weight(name, shape, scale):
    w = gaussian(*shape)
    for r in (1, 8, min(shape)):
        rest, a, b = DENSE[name](w, r, scale)
        assert a.shape == (r, shape[1]) and b.shape == (shape[0], r) and a.dtype == b.dtype == torch.float32
        assert all(t.is_contiguous() and not t.requires_grad for t in (rest, a, b))
        # Two sums in fp64 are rounded: that of the scheme, and that of this test.
        sums = 2 * (r + 2) * 2.0**-53 * (w.double().abs() + product(a.abs(), b.abs(), scale))
        rounding = EPS / 2 * rest.double().abs() + sums
        assert ((rest.double() + product(a, b, scale) - w.double()).abs() <= rounding).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DENSE)
def test_the_parts_sum_to_a_weight_of_16_bits_with_one_rounding(name, dtype):
    """W_res = W - s·B A is computed from A and B as they are rounded, whatever their dtype is. Then it is rounded once,
    to W's dtype."""
    w = gaussian(96, 160).to(dtype)
    for adapter in (torch.float32, dtype):
        rest, a, b = DENSE[name](w, 8, 2.0, dtype=adapter)
        assert rest.dtype == dtype and a.dtype == b.dtype == adapter
        exact = w.double() - product(a, b, 2.0)
        assert ((rest.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 2.0**-24).all()
    # W_res depends on how A and B are rounded.
    assert (rest.float() - DENSE[name](w, 8, 2.0)[0].float()).abs().max() > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", WEIGHTS)
def test_pissa_is_the_best_approximation(make, shape):
    """By Eckart and Young, the Frobenius norm of W - s·B A is the norm of the remaining singular values, and its
    largest singular value is the largest of them."""
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


def test_more_iterations_of_the_randomised_svd_are_nearer_to_the_best():
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
def test_base_and_adapter_are_those_of_peft(name, shape, monkeypatch):
    peft = pytest.importorskip("peft")

    def seeded(*args, **kwargs):  # it draws with the seed that `pissa` uses, whatever the global seed is
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


# --- reproducibility ---

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


@pytest.mark.parametrize("name", [name for name in DENSE if name in ALL])
def test_the_memory_layout_changes_only_the_rounding(name):
    w = low_rank_and_noise(96, 160)
    for one, other in zip(ALL[name](w), ALL[name](torch.empty(160, 96).T.copy_(w)), strict=True):
        assert other.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * one.abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_the_number_of_threads_changes_only_the_rounding(name):
    """The signs of the singular vectors are fixed. Where W is quantised, rounding may change a code at a boundary and
    with it all later results a little, but the norms hardly change."""
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
def test_weights_of_zeros_and_of_a_rank_below_r_give_finite_adapters(name):
    for w in (torch.zeros(24, 16), torch.randn(24, 2) @ torch.randn(2, 16)):
        rest, a, b, *_ = ALL[name](w)
        rest = rest.dequantize() if isinstance(rest, QuantizedWeight) else rest
        left = norm(w.double() - rest.double() - product(a, b, 2.0))
        assert a.isfinite().all() and b.isfinite().all() and left <= 0.1 * norm(w)
