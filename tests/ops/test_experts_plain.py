"""Experts in transforms, traces and with other tensors, which plain torch operations serve, and their FLOPs."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.experts_calls import Experts, experts
from support.wrapper import Wrapper
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import Rows, lora_linear_experts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def m() -> Experts:
    return experts(6, 4, 2, (3, 0, 4), rest=2)


def truth(m: Experts, x: Tensor) -> Tensor:
    """Return y in plain torch, without dropout."""
    whole = m.w + m.scale * m.b @ m.a
    y = [x[first:last] @ whole[e].t() + m.bias[e] for e, first, last in m.spans()]
    return torch.cat([*y, x.new_zeros(x.shape[0] - sum(m.counts), m.w.shape[1])])


def test_transforms_of_torch_func_are_served(m):
    rows = m.rows

    def call(x):
        return lora_linear_experts(x, m.w, m.a, m.b, rows, scale=m.scale, bias=m.bias)

    x, tangent = m.x, torch.randn_like(m.x)
    torch.testing.assert_close(torch.func.vmap(call)(x[None])[0], truth(m, x))
    got, want = (torch.func.grad(lambda x, f=f: f(x).square().sum())(x) for f in (call, lambda x: truth(m, x)))
    torch.testing.assert_close(got, want)
    got, want = (torch.func.jvp(f, (x,), (tangent,))[1] for f in (call, lambda x: truth(m, x)))
    torch.testing.assert_close(got, want)
    with forward_ad.dual_level():
        dual = call(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, want)
        of_a = lora_linear_experts(x, m.w, forward_ad.make_dual(m.a, m.a), m.b, rows, scale=m.scale)
        assert forward_ad.unpack_dual(of_a).tangent is not None


def test_a_transform_draws_the_mask_of_a_seed():
    m = experts(6, 16, 2, (13, 0, 9), rest=2, p=0.5)
    rows = m.rows

    def call(x):
        return lora_linear_experts(x, m.w, m.a, m.b, rows, scale=2.0, bias=m.bias, dropout_p=m.p, seed=m.seed)

    torch.testing.assert_close(torch.func.vmap(call)(m.x[None])[0], call(m.x))


class Layer(nn.Module):
    """A layer whose rows come as ids."""

    def __init__(self, m: Experts) -> None:
        super().__init__()
        self.parts = nn.ParameterList([m.w, m.a, m.b, m.bias])

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        w, a, b, bias = self.parts
        rows = Rows.by_id(ids, w.shape[0])
        return lora_linear_experts(x[rows.order], w.detach(), a, b, rows.in_order(), scale=0.5, bias=bias)


@pytest.mark.parametrize("tool", ["trace", "export"])
def test_what_is_recorded_serves_other_rows(m, tool):
    layer, ids = Layer(m), torch.tensor([0, 1, -1, 2, 2, 0, 1, -1, 2])
    if tool == "trace":
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            recorded = torch.jit.trace(layer, (m.x, ids))
        assert "lora_kernels::" not in str(recorded.inlined_graph)
    else:
        exported = torch.export.export(layer, (m.x, ids))
        assert not any("lora_kernels" in str(node.target) for node in exported.graph.nodes)
        recorded = exported.module()
    for other in (ids, ids.flip(0), torch.full((9,), -1), torch.full((9,), 2)):
        torch.testing.assert_close(recorded(m.x, other), layer(m.x, other))


def test_a_named_backend_is_refused_where_plain_torch_serves(m):
    def call(x):
        return lora_linear_experts(x, m.w, m.a, m.b, m.rows, scale=1.0, backend="eager").sum()

    with pytest.raises(RuntimeError, match=r"backend='eager' does not go with torch\.func's transforms"):
        torch.func.grad(call)(m.x)


def test_a_subclass_that_knows_torchs_operators_only_is_served(m):
    y = lora_linear_experts(Wrapper(m.x), m.w, m.a, m.b, m.rows, scale=m.scale, bias=m.bias)
    torch.testing.assert_close(y.inner, truth(m, m.x))


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_mkldnn])
def test_an_x_that_is_not_dense_is_refused_with_the_way_out(m, make):
    with pytest.raises(ValueError, match=r"call to_dense\(\) on x"):
        lora_linear_experts(make(m.x), m.w, m.a, m.b, m.rows, scale=1.0)


def flops(call) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


def test_a_counter_counts_the_rows_of_experts(m):
    leaves = [t.detach().requires_grad_() for t in (m.x, m.a, m.b)]

    def call(x, a, b):
        return lora_linear_experts(x, m.w, a, b, m.rows, scale=1.0)

    rows, (N, K, R) = 7, (6, 4, 2)  # two more rows have no expert
    forward, backward = 2 * rows * (N * K + R * (K + N)), 2 * rows * (N * K + 2 * R * (K + N))
    assert flops(lambda: call(m.x, m.a, m.b)) == forward
    assert flops(lambda: call(*leaves).sum().backward()) == forward + backward
    assert flops(lambda: call(m.x, leaves[1], m.b).sum().backward()) == forward + 2 * rows * R * (N + K)
