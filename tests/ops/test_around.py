"""`add_low_rank` adds the low-rank half to what any base has computed, in place only where nothing needs the old y."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lora_kernels import reference
from lora_kernels.core import accuracy, dropout
from lora_kernels.ops.around import add_low_rank, may_be_written

M, N, K, R = 37, 24, 40, 3


def operands(dtype=torch.float64, adapters=None, shape=(M,)):
    x, a, b = torch.randn(*shape, K), torch.randn(R, K) / K**0.5, torch.randn(N, R) / R**0.5
    y = torch.randn(*shape, N)
    adapters = adapters or dtype
    return [t.to(d).requires_grad_() for t, d in ((y, dtype), (x, dtype), (a, adapters), (b, adapters))]


def truth(y, x, a, b, p=0.0, seed=None, scale=0.75):
    """Return the sum and every gradient in fp64, for a gradient of ones and more."""
    y, x, a, b = (t.detach().double().requires_grad_() for t in (y, x, a, b))
    zero = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
    rows = x.reshape(-1, x.shape[-1])
    low = reference.lora_linear(rows, zero, a, b, scale=scale, dropout_p=p, seed=seed)
    out = y + low.view(y.shape)
    return [out.detach(), *torch.autograd.grad(out, (y, x, a, b), dy_of(out))]


def dy_of(out):
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(M,), (2, 3), (0,), (1, 1)])
def test_values_and_gradients_are_those_of_the_equation(p, shape, backend):
    dtype = torch.float32 if backend == "cpu" else torch.float64
    y, x, a, b = operands(dtype, shape=shape)
    seed = torch.tensor(5) if p else None
    out = add_low_rank(y, x, a, b, scale=0.75, dropout_p=p, seed=seed, backend=backend)
    got = [out.detach(), *torch.autograd.grad(out, (y, x, a, b), dy_of(out))]
    for value, exact in zip(got, truth(y, x, a, b, p, seed), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "adapters"), [
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32), (torch.float32, torch.bfloat16),
])  # fmt: skip
def test_errors_are_those_of_plain_torch(dtype, adapters):
    y, x, a, b = operands(dtype, adapters, shape=(300,))
    out = add_low_rank(y, x, a, b, scale=0.75)
    plain = y + (F.linear(F.linear(x.to(adapters), a), b) * 0.75).to(dtype)
    got, theirs = ([t.detach(), *torch.autograd.grad(t, (y, x, a, b), dy_of(t))] for t in (out, plain))
    for value, other, exact in zip(got, theirs, truth(y, x, a, b), strict=True):
        assert value.dtype == other.dtype
        errors = accuracy.errors_beside(value, exact, other)
        assert errors.rms <= errors.rms_allowed + 1e-7 and errors.worst <= errors.worst_allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_y_of_another_dtype_keeps_it(dtype):
    _, x, a, b = operands(torch.float32)
    y = torch.randn(M, N).to(dtype)
    before = y.clone()
    out = add_low_rank(y, x, a, b, scale=0.75)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), truth(before, x, a, b)[0], rtol=2e-2, atol=2e-2)


def test_y_is_written_to_only_where_nothing_needs_it():
    _, x, a, b = operands(torch.float32)
    w = torch.randn(N, K)
    fresh, computed = torch.randn(M, N), F.linear(x, w)
    for y in (fresh, computed):
        assert may_be_written(y, x)
        assert add_low_rank(y, x, a, b, scale=0.5).data_ptr() == y.data_ptr()
    kept = {
        "a saved result": F.linear(x, w).tanh(),
        "a view": torch.randn(2, M, N)[0],
        "a leaf": torch.randn(M, N, requires_grad=True),
        "strided": torch.randn(N, M).t(),
    }
    for what, y in kept.items():
        before = y.detach().clone()
        out = add_low_rank(y, x, a, b, scale=0.5)
        assert not may_be_written(y, x) and torch.equal(y, before) and out.data_ptr() != y.data_ptr(), what
        out.sum().backward(retain_graph=True)
    square = torch.randn(R, K), torch.randn(K, R)
    before = x.detach().clone()
    add_low_rank(x.detach(), x.detach(), *square, scale=1.0)
    assert torch.equal(x, before)


def test_a_base_in_inference_mode_and_a_recomputation_are_served():
    _, x, a, b = operands(torch.float32)
    w = torch.randn(N, K)
    with torch.inference_mode():
        y = F.linear(x, w)
        want = y + 0.5 * (x @ a.t() @ b.t())
        torch.testing.assert_close(add_low_rank(y, x, a, b, scale=0.5), want)
        outside = F.linear(x, w)
    with torch.no_grad():
        torch.testing.assert_close(add_low_rank(outside, x, a, b, scale=0.5), want)
    runs = []
    for once in (True, False):
        torch.manual_seed(1)

        def layer(x):
            return add_low_rank(F.linear(x, w), x, a, b, scale=0.5, dropout_p=0.2)

        y = layer(x) if once else checkpoint(layer, x, use_reentrant=False)
        runs.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, a, b))])
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_observed_calls_and_transforms_compute_the_same():
    y, x, a, b = operands()
    want = truth(y, x, a, b)[0]
    mapped = torch.func.vmap(lambda y, x: add_low_rank(y, x, a, b, scale=0.75))(y, x)
    torch.testing.assert_close(mapped, want)
    assert torch.autograd.gradcheck(lambda *t: add_low_rank(*t, scale=0.75), (y, x, a, b))
    with torch.autocast("cpu", torch.bfloat16):
        y32, x32, a32, b32 = (t.detach().float() for t in (y, x, a, b))
        out = add_low_rank(y32.clone(), x32, a32, b32, scale=0.75)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)


def test_the_mask_is_that_of_lora_linear():
    _, x, a, b = operands(torch.float32)
    seed = torch.tensor(11)
    out = add_low_rank(torch.zeros(M, N), x, a, b, scale=1.0, dropout_p=0.4, seed=seed)
    torch.testing.assert_close(out, dropout.dropout(x, 0.4, seed) @ a.t() @ b.t())


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"x": torch.randn(M, K + 1)}, ValueError, r"x must be \[..., K\]"),
    ({"y": torch.randn(M + 1, N)}, ValueError, "y must have the rows of x"),
    ({"a": torch.randn(R, K).half()}, TypeError, "A and B of one dtype"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\)"),
    ({"scale": float("inf")}, ValueError, "scale must be finite"),
])  # fmt: skip
def test_operands_that_do_not_fit_are_refused(change, error, text):
    y, x, a, b = (t.detach() for t in operands(torch.float32))
    given = {"y": y, "x": x, "a": a, "b": b, "scale": 1.0, "dropout_p": 0.0} | change
    positional = [given.pop(name) for name in ("y", "x", "a", "b")]
    with pytest.raises(error, match=text):
        add_low_rank(*positional, **given)


def test_a_second_derivative_is_refused():
    y, x, a, b = operands()
    out = add_low_rank(y, x, a, b, scale=0.75)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="add_low_rank has no double backward"):
        dx.sum().backward()


@pytest.mark.slow
def test_a_compiled_call_is_one_graph():
    _, x, a, b = operands(torch.float32)
    w = torch.randn(N, K)

    def layer(x):
        return add_low_rank(F.linear(x, w), x, a, b, scale=0.5)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    got, want = (torch.autograd.grad(each(x).square().sum(), (x, a, b)) for each in (compiled, layer))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_named_back_end_serves_the_call_or_raises(monkeypatch):
    from types import SimpleNamespace

    from lora_kernels.backends import dispatch

    y, x, a, b = operands(torch.float32)
    with pytest.raises(ValueError, match="backend='composite' cannot serve this call"):
        add_low_rank(y, x, a, b, scale=1.0, backend="composite")
    monkeypatch.setattr(dispatch, "pick", lambda call, backend: SimpleNamespace())
    with pytest.raises(ValueError, match="no kernel for the low-rank half alone"):
        add_low_rank(y, x, a, b, scale=1.0, backend="composite")
    torch.testing.assert_close(add_low_rank(y, x, a, b, scale=1.0), y + x @ a.t() @ b.t())
