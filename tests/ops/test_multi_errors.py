"""What `lora_linear_multi` cannot compute it refuses before any work, with the values and the way out."""

from __future__ import annotations

import pytest
import torch
from support.many import mixed

from lora_kernels import Adapter, AdapterStack, Rows, lora_linear_multi, quantize_weight
from lora_kernels.backends import eager
from lora_kernels.ops.multi import explain_multi


@pytest.fixture
def m(monkeypatch):
    """A batch of 6 rows and two adapters. No back-end may be reached."""

    def reached(*args):
        raise AssertionError("a back-end was called")

    monkeypatch.setattr(eager, "forward_multi", reached)
    return mixed(6, 12, 8, (2, 3), ids=torch.tensor([0, 1, -1, 0, 1, 1]))


def refused(error, words, x, w, adapters, rows, **kwargs):
    """Check that the call and its explanation raise the same error."""
    for call in (lora_linear_multi, explain_multi):
        with pytest.raises(error, match=words):
            call(x, w, adapters, rows, backend="eager", **kwargs)


def second(m, **changed):
    return [m.adapters[0], m.adapters[1]._replace(**changed)]


def test_adapters_and_rows_of_other_types_are_refused(m):
    refused(TypeError, "adapters must be a list of lora_kernels.Adapter or None, got a Adapter", m.x, m.w,
            m.adapters[0], m.rows)  # fmt: skip
    refused(TypeError, "got a dict", m.x, m.w, dict(enumerate(m.adapters)), m.rows)
    refused(TypeError, "adapter 1 must be a lora_kernels.Adapter or None, got a tuple", m.x, m.w,
            [m.adapters[0], tuple(m.adapters[1])], m.rows)  # fmt: skip
    refused(TypeError, "rows must be a lora_kernels.Rows, got a Tensor: see Rows.by_id", m.x, m.w, m.adapters, m.ids)
    refused(TypeError, "rows must be a lora_kernels.Rows, got a list", m.x, m.w, m.adapters, m.ids.tolist())


def test_rows_that_do_not_fit_x_or_the_adapters_are_refused(m):
    refused(ValueError, r"rows has 5 rows, and x \(6, 8\) has 6\. For one adapter per sample take Rows\.by_sample",
            m.x, m.w, m.adapters, Rows.by_id(m.ids[:5], 2))  # fmt: skip
    refused(ValueError, r"rows has 6 rows, and x \(2, 6, 8\) has 12", m.x.expand(2, 6, 8), m.w, m.adapters, m.rows)
    refused(ValueError, r"rows has 3 samples, and x \(2, 3, 8\) has 2", m.x.view(2, 3, 8), m.w, m.adapters,
            Rows.by_sample(["u", "v", "u"], ["u", "v"]))  # fmt: skip
    refused(ValueError, "rows names 3 adapters, and 2 were given", m.x, m.w, m.adapters, Rows.by_id(m.ids, 3))
    refused(ValueError, "rows names 2 adapters, and 1 were given", m.x, m.w, AdapterStack(m.adapters[:1]), m.rows)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"lora_a": torch.zeros(3, 9)}, ValueError, r"adapter 1: .*differ in K.*lora_a \(3, 9\)"),
        ({"lora_b": torch.zeros(11, 3)}, ValueError, r"adapter 1: .*differ in N.*lora_b \(11, 3\)"),
        ({"lora_a": torch.zeros(2, 8)}, ValueError, r"adapter 1: .*are the rank, but they differ.*lora_a \(2, 8\)"),
        ({"lora_a": torch.zeros(0, 8), "lora_b": torch.zeros(12, 0)}, ValueError, "adapter 1: .*at least 1"),
        ({"lora_a": torch.zeros(3 * 8)}, ValueError, r"adapter 1: .*lora_a \[R, K\]"),
        ({"dropout_p": 1.0}, ValueError, r"adapter 1: dropout_p must lie in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "adapter 1: dropout_p must lie .* got -0.1"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ({"scale": torch.zeros(2)}, ValueError, r"have one element, got torch.float32, shape \(2,\)"),
        ({"seed": -1, "dropout_p": 0.1}, ValueError, "seed must lie in .* got -1"),
        ({"seed": "7", "dropout_p": 0.1}, TypeError, "seed must be an int, an int64 tensor or None, got str"),
        ({"lora_a": torch.zeros(3, 8).double(), "lora_b": torch.zeros(12, 3).double()}, TypeError,
         "adapter 1: lora_a and lora_b must both have x's dtype.*lora_a torch.float64"),
        ({"lora_a": torch.zeros(3, 8).half()}, TypeError, "adapter 1: .*lora_a torch.float16"),
        ({"lora_a": torch.zeros(3, 8, device="meta")}, ValueError, "adapter 1: .*different devices.*meta"),
        ({"bias": torch.zeros(11)}, ValueError, r"the bias of adapter 1 must have shape \(12,\).*got \(11,\)"),
        ({"bias": torch.zeros(12, dtype=torch.int32)}, TypeError, "the bias of adapter 1 .* got torch.int32"),
        ({"bias": torch.zeros(12, device="meta")}, ValueError, "the bias of adapter 1 .*lie on cpu, got .* on meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_wrong_with_an_adapter_is_said_with_its_number(m, changed, error, words):
    refused(error, words, m.x, m.w, second(m, **changed), m.rows)


def test_adapters_of_several_dtypes_are_refused(m):
    x, w = m.x.bfloat16(), m.w.bfloat16()
    one = m.adapters[0]._replace(lora_a=m.adapters[0].lora_a.bfloat16(), lora_b=m.adapters[0].lora_b.bfloat16())
    refused(TypeError, r"one dtype, got torch.bfloat16 and, for adapter 1, torch.float32: convert them, or call once",
            x, w, [one, m.adapters[1]], m.rows)  # fmt: skip


def test_what_is_wrong_with_x_w_and_bias_is_refused(m):
    refused(TypeError, "x must be fp64, fp32, fp16 or bf16", m.x.int(), m.w, m.adapters, m.rows)
    refused(TypeError, "weight must have x's dtype", m.x, m.w.half(), m.adapters, m.rows)
    refused(TypeError, "bias must have x's dtype", m.x, m.w, m.adapters, m.rows, bias=m.bias.half())
    refused(ValueError, r"differ in N.*bias \(11,\)", m.x, m.w, m.adapters, m.rows, bias=m.bias[:11])
    refused(ValueError, r"differ in K.*x \(6, 7\)", m.x[:, :7], m.w, m.adapters, m.rows)
    refused(ValueError, r"x must be \[\.\.\., K\]", m.x[0, 0], m.w, m.adapters, m.rows)
    refused(ValueError, r"weight \(12, 8\) requires a gradient.*weight\.requires_grad_\(False\)", m.x,
            m.w.requires_grad_(), m.adapters, m.rows)  # fmt: skip


def test_operands_are_checked_where_there_is_no_adapter_too(m):
    rows = Rows.by_id([-1] * 6, 1)
    for none in ([], [None], AdapterStack([None])):
        given = rows if len(none) else Rows.by_id([-1] * 6, 0)
        refused(ValueError, "differ in K", m.x[:, :7], m.w, none, given)
        refused(TypeError, "bias must have x's dtype", m.x, m.w, none, given, bias=m.bias.half())


def test_a_stack_that_does_not_fit_is_refused(m):
    stack = AdapterStack(m.adapters)
    refused(ValueError, r"differ in K", torch.zeros(6, 9), torch.zeros(12, 9), stack, m.rows)
    refused(TypeError, "lora_a and lora_b must both have x's dtype", m.x.double(), m.w.double(), stack, m.rows)


def test_an_error_or_an_explanation_leaves_the_generator_as_it_was(m):
    given = second(m, dropout_p=0.5, lora_b=torch.zeros(11, 3))
    state = torch.get_rng_state()
    refused(ValueError, "differ in N", m.x, m.w, given, m.rows)
    given = second(m, dropout_p=0.5)
    refused(ValueError, "rows has 5 rows", m.x, m.w, given, Rows.by_id(m.ids[:5], 2))
    explain_multi(m.x, m.w, given, m.rows)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_damaged_quantised_weight_is_refused(m):
    w = quantize_weight(m.w, "int8")
    object.__setattr__(w, "scales", w.scales[:3])
    object.__setattr__(w, "checked", False)
    refused(ValueError, "scales", m.x, w, m.adapters, m.rows)


def test_a_dora_layer_has_another_function():
    """`Adapter` has no place for a magnitude."""
    with pytest.raises(TypeError, match="magnitude"):
        Adapter(torch.zeros(2, 8), torch.zeros(12, 2), 1.0, magnitude=torch.ones(12))
