"""MiLoRA takes the last singular triplets of W, by the definition of its paper in fp64."""

from __future__ import annotations

import pytest
import torch
from support.initialise_weights import EPS, WEIGHTS, gaussian, norm, product, same

from lora_kernels import FusedLoRAConv1D, FusedLoRALinear
from lora_kernels.nn.init import milora, pissa

pytestmark = pytest.mark.usefixtures("one_thread")


def planted(N: int, K: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a matrix with these singular values, and its singular vectors U [N, n] and V [K, n], in fp64."""
    u = torch.linalg.qr(torch.randn(N, len(values), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(K, len(values), dtype=torch.float64)).Q
    return u * values @ v.T, u, v


@pytest.mark.parametrize("shape", [(24, 33), (33, 24), (17, 17)])
def test_a_and_b_are_the_last_singular_triplets(shape):
    values = torch.linspace(3, 1, min(shape), dtype=torch.float64)
    w, u, v = planted(*shape, values)
    for r, scale in ((1, 1.0), (5, 0.4)):
        rest, a, b = milora(w.float(), r, scale)
        torch.testing.assert_close(
            product(a, b, scale), u[:, -r:] * values[-r:] @ v[:, -r:].T, rtol=0, atol=1e-4 * values[0].item()
        )
        torch.testing.assert_close(a.double().square().sum(1), values[-r:] / scale, rtol=1e-5, atol=0)
        torch.testing.assert_close(b.double().square().sum(0), values[-r:] / scale, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            torch.linalg.svdvals(rest.double())[: len(values) - r], values[:-r], rtol=1e-5, atol=0
        )
        assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("make", WEIGHTS)
def test_it_takes_the_least_that_an_update_of_this_rank_can_take(make):
    """The largest r values and the last r, as PiSSA and MiLoRA take them, are all values of a weight with min(N, K) =
    2r."""
    w = make(96, 16)
    values = torch.linalg.svdvals(w.double())
    minor, principal = (product(*split(w, 8, 2.0)[1:], 2.0) for split in (milora, pissa))
    assert norm(minor) == pytest.approx(values[8:].norm().item(), rel=1e-4)
    torch.testing.assert_close(minor + principal, w.double(), rtol=0, atol=40 * EPS * values[0].item())


def test_two_runs_give_the_same_bits_and_draw_nothing(poison):
    w = gaussian(40, 56)
    state = torch.get_rng_state()
    first = milora(w, 4, 2.0)
    assert torch.equal(torch.get_rng_state(), state) and same(first, milora(w, 4, 2.0))


@pytest.mark.parametrize("w", [torch.zeros(6, 9), torch.ones(6, 9)])
def test_singular_values_that_are_zero_are_refused_because_such_an_adapter_never_trains(w):
    with pytest.raises(ValueError, match=r"last 3 singular values of this weight \(6, 9\) are zero up to rounding"):
        milora(w, 3, 1.0)
    if w.any():
        assert milora(w, 6, 1.0)[1].abs().max() > 0  # the six are all values, and the first is not zero


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_a_layer_computes_what_the_linear_does_and_trains(settings):
    base, x = torch.nn.Linear(24, 20), torch.randn(5, 24)
    layer = FusedLoRALinear.from_linear(base, r=3, init="milora", **settings)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-4, atol=1e-5)
    assert layer.splits_base
    layer(x).square().sum().backward()
    assert layer.lora_A.grad.abs().max() > 0 and layer.lora_B.grad.abs().max() > 0


@pytest.mark.parametrize("init", ["milora", "gaussian", "orthogonal"])
def test_conv1d_of_gpt2_takes_it_in_its_own_layout(init):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    base, x = conv1d(20, 24), torch.randn(5, 24)
    layer = FusedLoRAConv1D.from_conv1d(base, r=4, init=init)
    assert layer.init == init and layer.splits_base == (init == "milora")
    torch.testing.assert_close(layer(x), base(x), rtol=1e-4, atol=1e-5)
    if init == "milora":
        values = torch.linalg.svdvals(base.weight.detach().double())[-4:]
        torch.testing.assert_close(layer.scaling * layer.lora_A.double().square().sum(1), values, rtol=1e-4, atol=1e-6)
