"""`lora_linear_experts` refuses operands that do not fit together, and names their values."""

from __future__ import annotations

import re

import pytest
import torch
from support.experts_calls import Experts, experts

from lora_kernels import Rows, lora_linear_experts, quantize_weight
from lora_kernels.backends import dispatch
from lora_kernels.core.operands import call_of_experts
from lora_kernels.ops import registered_experts


@pytest.fixture
def m() -> Experts:
    return experts(12, 8, 3, (4, 2), rest=1)


def refused(error, match, m, rows=None, **changed):
    given = {"x": m.x, "w": m.w, "a": m.a, "b": m.b, "bias": m.bias, "scale": 1.0} | changed
    x, w, a, b, bias, scale = (given.pop(name) for name in ("x", "w", "a", "b", "bias", "scale"))
    with pytest.raises(error, match=match):
        lora_linear_experts(x, w, a, b, m.rows if rows is None else rows, scale=scale, bias=bias, **given)


def test_shapes_that_do_not_fit_are_refused(m):
    every = r"weight \[E, N, K\].*got x \(7, 8\)"
    refused(ValueError, every, m, w=m.w[0])
    refused(ValueError, every, m, a=m.a[0])
    refused(ValueError, r"x must be \[M, K\].*x \(1, 7, 8\)", m, x=m.x[None])
    refused(ValueError, r"bias \[E, N\]; got", m, bias=m.bias[0])
    refused(ValueError, r"the same experts.*lora_b \(1, 12, 3\)", m, b=m.b[:1])
    refused(ValueError, r"the same experts", m, w=m.w[:0], a=m.a[:0], b=m.b[:0], bias=None)
    refused(ValueError, r"differ in K.*in each of 2 experts", m, x=m.x[:, :7])
    refused(ValueError, r"differ in N.*bias \(11,\), in each of 2 experts", m, bias=m.bias[:, :11])
    refused(ValueError, r"rank, but they differ", m, a=m.a[:, :2])


def test_dtypes_that_do_not_fit_are_refused(m):
    refused(TypeError, "weight must have x's dtype", m, w=m.w.half())
    refused(TypeError, "bias must have x's dtype", m, bias=m.bias.half())
    refused(TypeError, "lora_a and lora_b must both have x's dtype", m, a=m.a.half())
    refused(TypeError, "x must be fp64, fp32, fp16 or bf16", m, x=m.x.int())
    refused(TypeError, r"\[E, N, K\], got a QuantizedWeight: no experts", m, w=quantize_weight(m.w[0], "int8"))


def test_rows_that_do_not_fit_are_refused(m):
    refused(TypeError, "rows must be a lora_kernels.Rows, got a Tensor", m, rows=torch.zeros(7))
    refused(ValueError, r"rows names 3 experts, and weight has 2", m, rows=Rows.by_length([4, 2, 1], [0, 1, 2]))
    refused(ValueError, r"rows has 6 rows, and x \(7, 8\) has 7 rows", m, rows=Rows.by_length([4, 2], [0, 1]))
    samples = Rows.by_sample(["u"] * 7, ["u", "v"])
    refused(ValueError, r"rows has 7 samples", m, rows=samples)
    for ids in ([0, 1, 0, 1, 1, 1, 1], [0, -1, 1, 1, 1, 1, 1]):
        refused(ValueError, r"must follow each other in x.*x\[rows\.order\] and rows\.in_order", m,
                rows=Rows.by_id(ids, 2))  # fmt: skip


def test_settings_that_do_not_fit_are_refused(m):
    refused(ValueError, r"dropout_p must lie in \[0, 1\), got 1\.0", m, dropout_p=1.0)
    refused(ValueError, "scale must be finite, got inf", m, scale=float("inf"))
    refused(TypeError, "seed must be an int", m, dropout_p=0.1, seed=1.5)
    refused(ValueError, r"weight .* requires a gradient.*requires_grad_\(False\)", m, w=m.w.detach().requires_grad_())
    refused(ValueError, "unknown backend 'tpu'", m, backend="tpu")


def test_composite_names_the_device_that_it_does_not_serve(m):
    pytest.importorskip("triton", "3.6")
    refused(ValueError, r"not on cpu", m, backend="composite")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backends_for_one_layer_refuse_by_name(m, name):
    if name == "triton":
        pytest.importorskip("triton", "3.6")
    call = call_of_experts("forward_experts", m.x, m.base, m.adapter)
    assert any("the back-end composite serves the experts of a layer" in each for each in dispatch.refusals(name, call))


def test_an_error_leaves_the_generator_as_it_was(m):
    state = torch.get_rng_state()
    refused(ValueError, "follow each other", m, rows=Rows.by_id([0, 1] * 3 + [1], 2), dropout_p=0.5)
    refused(ValueError, "scale must be finite", m, scale=float("nan"), dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_operators_check_the_order_and_the_dtypes_themselves(m):
    out_of_order = Rows.by_id([0, 1, 0, 1, 1, 1, 1], 2)
    with pytest.raises(ValueError, match="must follow each other"):
        registered_experts.forward_experts(m.x, m.base, m.adapter, out_of_order, None, False)
    half = m.adapter._replace(a=m.a.half())
    with pytest.raises(TypeError, match=re.escape("lora_a and lora_b in the same")):
        registered_experts.forward_experts(m.x, m.base, half, m.rows, None, False)
