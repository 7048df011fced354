"""Each back-end that runs on this machine's CPU computes the equation: values and every gradient, judged in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import judging

from lora_kernels import lora_linear
from lora_kernels.backends import dispatch
from lora_kernels.testing import one_layer


def results(q: judging.Problem, backend: str) -> dict[str, torch.Tensor]:
    return judging.evaluate(q, lora_linear, backend=backend)


@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
@pytest.mark.parametrize("shape", judging.SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_values_and_gradients_are_those_of_the_equation(backend, shape, dtypes, p, strided, poison):
    q = judging.problem(*shape, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p, strided=strided)
    got = results(q, backend)
    judging.check(got, q)
    assert all(t.is_contiguous() for t in got.values())
    assert (got["y"].dtype, got["dx"].dtype, got["da"].dtype, got["db"].dtype) == (*dtypes[:1] * 2, *dtypes[1:] * 2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_equation_holds_for_any_shape(backend, data):
    size = st.integers(1, 70)
    M, N, K = data.draw(st.integers(0, 70)), data.draw(size), data.draw(size)
    R = data.draw(st.sampled_from([1, 2, 4, 5, 8, 12, 16, 24, 32, 33, 64, 130]))
    dtype, adapter_dtype = data.draw(st.sampled_from(judging.DTYPES))
    q = judging.problem(
        M, N, K, R,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        p=data.draw(st.sampled_from([0.0, 0.1, 0.9])),
        bias=data.draw(st.booleans()),
        strided=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([0.5, -2.0, 1.0])),
        seed=data.draw(st.integers(0, 1000)),
    )  # fmt: skip
    judging.check(results(q, backend), q)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_equation_holds_for_sizes_above_every_block(backend, p, poison):
    q = judging.problem(700, 530, 300, 12, p=p)
    judging.check(results(q, backend), q)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (1, 1, 1, 1), (2, 3, 9, 11), (0, 2, 3, 1)], ids=str)
def test_gradients_pass_gradcheck_in_fp64(shape, p):
    q = judging.problem(*shape, dtype=torch.float64, p=p)
    leaves = [t.requires_grad_() for t in (q.x, q.a, q.b, q.bias)]
    torch.autograd.gradcheck(
        lambda x, a, b, bias: lora_linear(
            x, q.w, a, b, scale=q.scale, bias=bias, dropout_p=p, seed=q.seed, backend="eager"
        ),
        leaves,
        check_undefined_grad=False,
    )


@pytest.mark.parametrize("needs", [(i >> 2 & 1, i >> 1 & 1, i & 1) for i in range(1, 8)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_the_gradients_that_are_asked_for_are_computed(backend, needs, p):
    q = judging.problem(20, 24, 40, 8, p=p)
    want = judging.truth(q)
    need_dx, need_da, need_db = map(bool, needs)
    module = dispatch.load(backend)
    _, h = one_layer.forward(module, q.x, q.w, q.a, q.b, q.bias, q.scale, p, q.seed, need_db)
    assert (h is not None) == need_db
    x = q.x if need_da else None
    grads = one_layer.backward(module, q.dy, x, q.w, q.a, q.b, h, q.scale, p, q.seed, need_dx, need_da, need_db)
    assert [g is not None for g in grads] == [need_dx, need_da, need_db]
    judging.check(dict(zip(("dx", "da", "db"), grads, strict=True)), q, want)


@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_gradients_are_bit_identical_from_run_to_run(backend, dtypes):
    q = judging.problem(300, 200, 250, 16, dtype=dtypes[0], adapter_dtype=dtypes[1], p=0.2)
    first = results(q, backend)
    for _ in range(4):
        again = results(q, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_mask_is_the_same_in_every_backend(backend):
    """With A and B the identity, s = 1 and W = 0, y is x̂ itself."""
    K, p = 48, 0.35
    x = torch.rand(37, K) + 0.5
    eye, seed = torch.eye(K), torch.tensor(99)
    y = lora_linear(x, torch.zeros(K, K), eye, eye, scale=1.0, dropout_p=p, seed=seed, backend=backend)
    from lora_kernels.core.dropout import keep_mask

    assert torch.equal(y != 0, keep_mask(seed, 37, K, p))


def test_nothing_received_or_saved_is_written_to(backend):
    q = judging.problem(30, 20, 40, 4, p=0.2)
    before = [t.clone() for t in (q.x, q.w, q.a, q.b, q.bias, q.dy, q.seed)]
    results(q, backend)
    for t, was in zip((q.x, q.w, q.a, q.b, q.bias, q.dy, q.seed), before, strict=True):
        assert torch.equal(t, was)


def test_the_low_rank_term_is_not_rounded_before_it_meets_the_base():
    """vLLM and SGLang round s·h·bᵀ to bf16 before they add the base product. The CPU kernels add it in fp32, and their
    error is smaller."""
    try:
        dispatch.load("cpu")
    except ImportError as error:
        pytest.skip(f"backend 'cpu' is not built: {error}")
    q = judging.problem(256, 256, 256, 16, dtype=torch.bfloat16, bias=False)
    exact = judging.truth(q)["y"]
    rounded_first = q.x @ q.w.t() + (q.scale * ((q.x @ q.a.t()) @ q.b.t()))
    ours = results(q, "cpu")["y"]
    assert (ours - exact).square().mean() < (rounded_first - exact).square().mean()
