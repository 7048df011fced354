"""The rows of tokens on their way to the experts and back: values, gradients and their bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lora_kernels.nn import experts_rows
from lora_kernels.nn.experts_rows import Routing, combine, gather, route

T, K, E, H = 40, 3, 6, 70
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def routing() -> tuple[Tensor, Routing]:
    torch.manual_seed(0)
    ids = torch.randint(0, E + 1, (T, K))  # with some ids of no expert, and duplicates
    return ids, route(ids, E)


def test_rows_are_sorted_by_expert_and_those_without_one_come_last():
    ids, found = routing()
    flat = ids.flatten()
    experts = flat[found.inverse.flatten().argsort()]
    assert torch.equal(experts, experts.sort().values) and experts[-1] == E
    assert found.rows.counts == tuple((flat == e).sum().item() for e in range(E)) and found.rows.is_in_order
    assert torch.equal(found.tokens[found.inverse], torch.arange(T)[:, None].expand(T, K))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_gathered_and_their_gradients_summed_once_rounded(dtype):
    _, found = routing()
    x, dz = torch.randn(T, H).to(dtype).requires_grad_(), torch.randn(T * K, H).to(dtype)
    z = gather(x, found)
    z.backward(dz)
    assert torch.equal(z, x[found.tokens])
    exact = torch.zeros(T, H, dtype=torch.float64).index_add_(0, found.tokens, dz.double())
    near(x.grad, exact)


@pytest.mark.parametrize(
    ("dtype", "of_weights"), [pair for pair in itertools.product(DTYPES, DTYPES[:3]) if pair[0] != torch.float64]
)
@pytest.mark.parametrize("autocast", [False, True])
def test_results_are_weighted_and_summed_in_fp32_at_least(dtype, of_weights, autocast):
    _, found = routing()
    z = torch.randn(T * K, H).to(dtype).requires_grad_()
    weights = torch.rand(T, K).to(of_weights).requires_grad_()
    dy = torch.randn(T, H).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = combine(z, weights, found, dtype)
        y.backward(dy)
    rows, w = z.detach().double()[found.inverse], weights.detach().double()
    near(y.detach(), (rows * w[..., None]).sum(1))
    near(weights.grad, (rows * dy.double()[:, None]).sum(-1))
    exact = torch.empty(T * K, H, dtype=torch.float64)
    exact[found.inverse] = w[..., None] * dy.double()[:, None]
    near(z.grad, exact)


def near(got: Tensor, exact: Tensor) -> None:
    """Assert that `got` is `exact` but for sums in fp32 and one rounding."""
    eps = torch.finfo(got.dtype).eps
    slack = 1e-5 if got.dtype != torch.float64 else 1e-13
    assert ((got.double() - exact).abs() <= 0.5 * eps * exact.abs() + slack).all()


def test_a_recorded_call_computes_the_same(monkeypatch):
    _, found = routing()
    x, weights = torch.randn(T, H), torch.rand(T, K)
    want = combine(gather(x, found), weights, found, torch.float32)
    monkeypatch.setattr(experts_rows, "_is_plain", lambda: True)
    torch.testing.assert_close(combine(gather(x, found), weights, found, torch.float32), want)
