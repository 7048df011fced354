"""`lora_linear_multi` gives every row what its adapter gives it, and every adapter the gradients of its own rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import judging, many
from support.many import RANKS, mixed, run

from lora_kernels import Adapter, AdapterStack, Rows, lora_linear, lora_linear_multi, quantize_weight
from lora_kernels.backends import eager
from lora_kernels.ops.multi import explain_multi


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K", "ranks"),
    [(37, 40, 24, RANKS), (0, 16, 8, (2, 3)), (1, 7, 5, (4, 1)), (200, 97, 130, (8, 13)), (30, 17, 33, (3, None, 1))],
)
def test_values_and_gradients_are_those_of_each_adapter_alone(M, N, K, ranks, dtypes, p, backend):
    m = mixed(M, N, K, ranks, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p)
    many.check(m, run(m, backend=backend))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_strided_operands_are_served(p, backend):
    m = mixed(45, 40, 24, p=p, strided=True)
    many.check(m, run(m, backend=backend))


def test_fp64_is_served():
    m = mixed(45, 40, 24, dtype=torch.float64, p=0.3)
    many.check(m, run(m))


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_bases_are_served(format, dtype, backend):
    m = mixed(45, 40, 64, (1, 8, 13), dtype=dtype, adapter_dtype=torch.float32, p=0.2)
    m = replace(m, w=quantize_weight(m.w, format))
    many.check(m, run(m, backend=backend))
    without = replace(m, ids=torch.full((45,), -1))
    got = run(without, backend=backend)
    plain = F.linear(m.x, m.w.dequantize(dtype), m.bias)
    torch.testing.assert_close(got.y, plain)
    assert got.da == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_stack_serves_what_a_list_serves(dtype, backend):
    m = mixed(37, 40, 24, (*RANKS, None), dtype=dtype)
    many.check(m, many.Results(many.served(m, backend=backend)))


def test_a_call_without_gradients_gives_the_bits_of_one_with_gradients(backend):
    m = mixed(37, 40, 24, p=0.2)
    with torch.no_grad():
        y = lora_linear_multi(m.x, m.w, m.adapters, m.rows, bias=m.bias, backend=backend)
    with torch.inference_mode():
        again = lora_linear_multi(m.x, m.w, m.adapters, m.rows, bias=m.bias, backend=backend)
    assert not y.requires_grad and torch.equal(y, run(m, backend=backend).y) and torch.equal(y, again)


def test_one_adapter_with_every_row_is_lora_linear():
    q = judging.problem(33, 40, 24, 8, p=0.2)
    want = judging.evaluate(q, lora_linear, backend="eager")
    m = many.Mixed(q.x, q.w, q.bias, q.dy, [Adapter(q.a, q.b, q.scale, q.p, q.seed)], torch.zeros(33, dtype=torch.long))
    got = run(m, backend="eager")
    for name, value in (("y", got.y), ("dx", got.dx), ("da", got.da[0]), ("db", got.db[0]), ("dbias", got.dbias)):
        assert torch.equal(value, want[name]), name


def test_gradients_pass_gradcheck():
    m = mixed(9, 5, 4, (1, 3, 2), dtype=torch.float64, p=0.4)
    biases = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in m.adapters]
    scales = [torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for _ in m.adapters]
    leaves = [t.detach().requires_grad_() for each in m.adapters for t in each[:2]]

    def call(x, bias, *rest):
        adapters = [
            each._replace(lora_a=rest[2 * i], lora_b=rest[2 * i + 1], scale=rest[6 + i], bias=rest[9 + i])
            for i, each in enumerate(m.adapters)
        ]
        return lora_linear_multi(x, m.w, adapters, m.rows, bias=bias)

    torch.autograd.gradcheck(
        call, (m.x.requires_grad_(), m.bias.requires_grad_(), *leaves, *scales, *biases), fast_mode=True
    )


def test_only_the_gradients_that_are_asked_are_computed(monkeypatch):
    m = mixed(20, 12, 8, (2, 3, 4), ids=torch.arange(20) % 4 - 1)
    asked = []
    inner = eager.backward_multi
    monkeypatch.setattr(eager, "backward_multi", lambda *args: asked.append(args) or inner(*args))
    (a0, b0), (_, b2) = (each[:2] for each in (m.adapters[0], m.adapters[2]))
    adapters = [
        m.adapters[0]._replace(lora_a=a0.requires_grad_()),
        m.adapters[1],
        m.adapters[2]._replace(lora_b=b2.requires_grad_()),
    ]
    lora_linear_multi(m.x, m.w, adapters, m.rows, backend="eager").backward(m.dy)
    (_, saved_x, _, _, _, h, needs), *_ = asked
    assert needs.dx is False and list(needs.da) == [True, False, False] and list(needs.db) == [False, False, True]
    assert saved_x is not None and h is not None and b0.grad is None
    q0, q2 = many.problem_of(m, 0), many.problem_of(m, 2)
    judging.check({"da": a0.grad}, q0)
    judging.check({"db": b2.grad}, q2)
    x = m.x.clone().requires_grad_()
    frozen = [each._replace(lora_a=each.lora_a.detach(), lora_b=each.lora_b.detach()) for each in adapters]
    lora_linear_multi(x, m.w, frozen, m.rows, backend="eager").backward(m.dy)
    assert asked[1][1] is None and asked[1][5] is None and x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_biases_of_adapters_are_added_to_their_rows(dtype):
    m = mixed(3000, 12, 8, (2, None, 4, 1), dtype=dtype, ids=torch.arange(3000) % 4 - 1)
    own = [torch.randn(12).to(dtype).requires_grad_() for _ in m.adapters]
    adapters = [each and each._replace(bias=bias) for each, bias in zip(m.adapters, own, strict=True)]
    y = lora_linear_multi(m.x, m.w, adapters, m.rows, bias=m.bias)
    without = lora_linear_multi(m.x, m.w, m.adapters, m.rows, bias=m.bias)
    y.backward(m.dy)
    for i in range(4):
        rows = m.of(i)
        if m.adapters[i] is None or not len(rows):
            assert own[i].grad is None
            torch.testing.assert_close(y[rows], without[rows])
            continue
        scale = m.adapters[i].scale
        torch.testing.assert_close(y[rows], without[rows] + scale * own[i])
        torch.testing.assert_close(own[i].grad, (scale * m.dy[rows].double().sum(0)).to(dtype))
    assert torch.equal(y[m.of(-1)], without[m.of(-1)])


def test_tensor_scales_get_their_gradients():
    m = mixed(30, 12, 8, (2, 4))
    scales = [torch.tensor(0.5, requires_grad=True), torch.tensor([-1.5])]
    adapters = [each._replace(scale=scale) for each, scale in zip(m.adapters, scales, strict=True)]
    y = lora_linear_multi(m.x, m.w, adapters, m.rows)
    y.backward(m.dy)
    a, b = m.adapters[0][:2]
    low = m.x[m.of(0)] @ a.t() @ b.t()
    torch.testing.assert_close(scales[0].grad, (low * m.dy[m.of(0)]).sum())
    fixed = [each._replace(scale=float(scale.detach())) for each, scale in zip(m.adapters, scales, strict=True)]
    torch.testing.assert_close(y, lora_linear_multi(m.x, m.w, fixed, m.rows))


def test_rows_of_samples_and_leading_dimensions_are_served():
    m = mixed(4 * 6, 12, 8, (2, 4), ids=torch.tensor([1, -1, 0, 1]).repeat_interleave(6))
    rows = Rows.by_sample(["v", None, "u", "v"], ["u", "v"])
    want = run(m)
    for shape in ((4, 6, 8), (4, 2, 3, 8)):
        x = m.x.view(shape).clone().requires_grad_()
        y = lora_linear_multi(x, m.w, m.adapters, rows, bias=m.bias)
        y.backward(m.dy.view(y.shape))
        assert y.is_contiguous() and torch.equal(y.view(24, 12), want.y)
        torch.testing.assert_close(x.grad.view(24, 8), want.dx)
    flat = lora_linear_multi(m.x.view(4, 6, 8), m.w, m.adapters, m.rows, bias=m.bias)
    assert flat.shape == (4, 6, 12)
    one = lora_linear_multi(m.x[0], m.w, m.adapters, Rows.by_id([1], 2), bias=m.bias)
    torch.testing.assert_close(one, want.y[0])
    none = lora_linear_multi(m.x[:0].view(0, 6, 8), m.w, m.adapters, Rows.by_sample([], ["u", "v"]), bias=m.bias)
    assert none.shape == (0, 6, 12)


@pytest.mark.parametrize("adapters", [[], [None, None], AdapterStack([]), AdapterStack([None] * 3)], ids=repr)
def test_a_layer_without_adapters_is_the_frozen_layer(adapters):
    m = mixed(20, 12, 8, ())
    x, bias = m.x.requires_grad_(), m.bias.requires_grad_()
    rows = Rows.by_id(torch.arange(20) % (len(adapters) + 1) - 1, len(adapters))
    y = lora_linear_multi(x, m.w, adapters, rows, bias=bias)
    y.backward(m.dy)
    assert torch.equal(y, F.linear(x, m.w, bias))
    assert torch.equal(x.grad, m.dy @ m.w)
    torch.testing.assert_close(bias.grad, m.dy.sum(0))
    w = quantize_weight(m.w, "int8")
    torch.testing.assert_close(
        lora_linear_multi(x, w, adapters, rows, bias=bias), F.linear(x, w.dequantize(torch.float32), bias)
    )


@pytest.mark.parametrize("format", [None, "nf4"])
def test_rows_of_an_adapter_that_the_layer_lacks_beside_a_trained_one_without_rows(format):
    """The frozen layer computes them, and its backward gives the trained adapter no gradient."""
    x, w = torch.randn(5, 64, requires_grad=True), torch.randn(8, 64)
    w = w if format is None else quantize_weight(w, format)
    a, b = torch.randn(2, 64, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    y = lora_linear_multi(x, w, [None, Adapter(a, b, 1.0)], Rows.by_id([0] * 5, 2))
    dense = w if format is None else w.dequantize(torch.float32)
    torch.testing.assert_close(y, F.linear(x, dense))
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(5, -1))
    assert a.grad is None and b.grad is None


def test_explain_tells_ranks_rows_and_the_backends_of_both_passes():
    m = mixed(12, 12, 8, (2, None, 5), ids=torch.tensor([0, 0, 2, -1] * 3))
    told = explain_multi(m.x, m.w, m.adapters, m.rows, bias=m.bias, backend="eager")
    assert told.forward == told.backward == "eager" and told.call.op == "forward_multi" and told.call.R == 5
    text = str(told)
    assert (
        "2 adapters of ranks 2, 5" in text and "rows of each: 6, 0, 3" in text and "3 rows without an adapter" in text
    )
    assert "forward" in text and "backward" in text
    none = explain_multi(m.x, m.w, [], Rows.by_id([-1] * 12, 0))
    assert "12 rows without an adapter" in str(none)
