"""`lora_linear_experts` gives every row what its expert gives it, and every expert the gradients of its own rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import judging
from support.experts_calls import COUNTS, Experts, check, experts, run

from lora_kernels import Rows, lora_linear, lora_linear_experts
from lora_kernels.ops.experts import explain_experts

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [
    (24, 40, 8, COUNTS, 0),
    (17, 33, 3, (0, 9, 0), 4),
    (1, 1, 1, (3, 1), 0),
    (97, 130, 13, (70, 0, 33, 20), 5),
    (16, 24, 40, (6,), 2),
    (12, 8, 2, (0, 0, 0), 0),
    (12, 8, 2, (0, 0), 3),
    (9, 70, 5, (1, 1, 1, 1), 1),
]
"""N, K, R, the rows of each expert, and the rows without one: ragged, one expert, no rows, none with an expert."""


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "R", "counts", "rest"), SHAPES)
def test_values_and_gradients_are_those_of_each_expert_alone(N, K, R, counts, rest, dtypes, p, backend):
    m = experts(N, K, R, counts, rest=rest, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p)
    check(m, run(m, backend=backend))


@pytest.mark.parametrize("layout", ["peft", "strided"])
@pytest.mark.parametrize("dtypes", judging.DTYPES[::2], ids=str)
def test_every_layout_is_served(layout, dtypes, backend):
    m = experts(40, 24, 6, rest=2, dtype=dtypes[0], adapter_dtype=dtypes[1], p=0.3, layout=layout)
    check(m, run(m, backend=backend))


def test_fp64_is_served():
    m = experts(24, 40, 8, rest=3, dtype=torch.float64, p=0.3)
    check(m, run(m))


def test_gradients_pass_gradcheck():
    m = experts(5, 4, 3, (3, 0, 4), rest=1, dtype=torch.float64, p=0.4, layout="peft")
    E, N, R = m.b.shape
    stored = m.b.permute(1, 2, 0).reshape(N, R * E)

    def call(x, a, stored, bias):
        b = stored.view(N, R, E).permute(2, 0, 1)
        return lora_linear_experts(x, m.w, a, b, m.rows, scale=m.scale, bias=bias, dropout_p=m.p, seed=m.seed)

    leaves = [t.detach().contiguous().requires_grad_() for t in (m.x, m.a, stored, m.bias)]
    assert torch.autograd.gradcheck(call, leaves)


def test_one_expert_with_every_row_is_lora_linear(backend):
    q = judging.problem(33, 40, 24, 8, p=0.2)
    m = Experts(q.x, q.w[None], q.a[None], q.b[None], q.bias[None], q.dy, q.scale, q.p, q.seed, (33,))
    got, want = run(m, backend=backend), judging.evaluate(q, lora_linear, backend="eager")
    for name in ("y", "dx"):
        torch.testing.assert_close(got[name], want[name])
    for name in ("da", "db", "dbias"):
        torch.testing.assert_close(got[name][0], want[name])


def test_a_call_without_gradients_gives_the_bits_of_one_with_gradients(backend):
    m = experts(24, 40, 8, rest=3, p=0.2)
    how = {"scale": m.scale, "bias": m.bias, "dropout_p": m.p, "seed": m.seed, "backend": backend}
    with torch.no_grad():
        y = lora_linear_experts(m.x, m.w, m.a, m.b, m.rows, **how)
    with torch.inference_mode():
        again = lora_linear_experts(m.x, m.w, m.a, m.b, m.rows, **how)
    assert not y.requires_grad and torch.equal(y, again) and torch.equal(y, run(m, backend=backend)["y"])


def test_two_runs_give_the_same_bits(backend):
    m = experts(24, 40, 8, rest=3, p=0.2, layout="peft")
    first, second = run(m, backend=backend), run(m, backend=backend)
    assert all(torch.equal(first[name], second[name]) for name in ("y", "dx", "da", "db", "dbias"))


@pytest.mark.parametrize("wanted", [["x"], ["a"], ["b"], ["bias"], ["a", "b"], ["x", "b"]])
def test_only_the_gradients_that_are_asked_for_are_given(wanted, backend):
    m = experts(24, 40, 8, rest=3, p=0.2)
    got, every = run(m, wanted=wanted, backend=backend), run(m, backend=backend)
    assert set(got) == {"y", *(f"d{name}" for name in wanted)}
    assert all(torch.equal(t, every[name]) for name, t in got.items())


def test_rows_of_ids_that_are_not_sorted_serve_after_a_gather(backend):
    """How a router calls: its choices in any order, the same token twice, and rows for the experts of others."""
    m = experts(24, 40, 8, (0,) * 5)
    ids = torch.tensor([3, 0, 4, 4, -1, 0, 3, 3, 0, -1, 4])
    tokens = torch.randn(6, 40)
    x = tokens[torch.arange(11) // 2]
    rows = Rows.by_id(ids, 5)
    y = lora_linear_experts(x[rows.order], m.w, m.a, m.b, rows.in_order(), scale=2.0, bias=m.bias, backend=backend)
    got = torch.empty_like(y)
    got[rows.order.long()] = y
    for token, e, row in zip(x, ids.tolist(), got, strict=True):
        one = lora_linear(token, m.w[e], m.a[e], m.b[e], scale=2.0, bias=m.bias[e])
        torch.testing.assert_close(row, torch.zeros(24) if e < 0 else one)


def test_a_scale_may_be_a_tensor_with_a_gradient():
    m = experts(24, 40, 8)
    scale = torch.tensor(0.75, requires_grad=True)
    y = lora_linear_experts(m.x, m.w, m.a, m.b, m.rows, scale=scale, bias=m.bias)
    y.backward(m.dy)
    without = run(replace(m, scale=0.0))["y"]
    torch.testing.assert_close(y.detach(), run(m)["y"])
    torch.testing.assert_close(scale.grad, ((y.detach() - without) * m.dy).sum() / 0.75, rtol=1e-3, atol=1e-3)


def test_a_drawn_seed_is_reproducible():
    m = experts(24, 40, 8, p=0.5)
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(run(replace(m, seed=None))["y"])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_an_explanation_names_the_backend_and_the_rows():
    m = experts(24, 40, 8, rest=3)
    told = explain_experts(m.x, m.w, m.a, m.b, m.rows, bias=m.bias)
    assert told.forward == told.backward == "cpu" and "7 experts" in told.rows and "3 rows without" in told.rows
    assert told.passed_over["triton"] and "not for cpu tensors" in str(told)
