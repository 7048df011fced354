"""The initialisations refuse bad arguments, with the values in the message."""

from __future__ import annotations

import math

import pytest
import torch

from lora_kernels.nn.init import loftq, lq_lora, olora, pissa

W = torch.zeros(4, 6)
NAN = torch.zeros(4, 6).index_put_((torch.tensor([1, 3]), torch.tensor([2, 0])), torch.tensor(math.nan))
INF = torch.zeros(4, 6).index_put_((torch.tensor([3]), torch.tensor([5])), torch.tensor(-math.inf))
HUGE = torch.linspace(-1e36, 1e36, 24).view(4, 6)
EVERY = {"pissa": pissa, "olora": olora, "loftq": loftq, "lq_lora": lq_lora}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("w", "r", "scale", "kwargs", "error", "says"),
    [
        (W, 0, 1.0, {}, ValueError, r"between 1 and min\(N, K\) = 4 .* \(4, 6\), got 0"),
        (W, 5, 1.0, {}, ValueError, r"between 1 and min\(N, K\) = 4 .* \(4, 6\), got 5"),
        (W, 2, 0.0, {}, ValueError, "positive and finite .* got 0.0"),
        (W, 2, -2.0, {}, ValueError, "positive and finite .* got -2.0"),
        (W, 2, math.inf, {}, ValueError, "positive and finite .* got inf"),
        (W, 2, math.nan, {}, ValueError, "positive and finite .* got nan"),
        (W[0], 2, 1.0, {}, ValueError, r"must be \[N, K\] .* got \(6,\)"),
        (W.double(), 2, 1.0, {}, TypeError, "fp32, bf16 or fp16, got torch.float64 and torch.float32"),
        (W.int(), 2, 1.0, {}, TypeError, "got torch.int32"),
        (W, 2, 1.0, {"dtype": torch.float64}, TypeError, "got torch.float32 and torch.float64"),
        (NAN, 2, 1.0, {}, ValueError, r"2 of the 24 elements .* first of them nan at \(1, 2\)"),
        (INF.half(), 2, 1.0, {}, ValueError, r"1 of the 24 elements .* first of them -inf at \(3, 5\)"),
        (HUGE, 2, 1e-3, {"dtype": torch.float16}, ValueError, "A overflows torch.float16: take fp32"),
    ],
)
def test_bad_arguments_of_any_scheme_are_named(name, w, r, scale, kwargs, error, says):
    with pytest.raises(error, match=says):
        EVERY[name](w, r, scale, **kwargs)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pissa(W, 2, 1.0, niter=-1), "niter must be at least 0.* got -1"),
        (lambda: loftq(W, 2, 1.0, niter=-1), "niter must be at least 0.* got -1"),
        (lambda: loftq(W, 2, 1.0, iterations=0), "iterations must be at least 1, got 0"),
        (lambda: lq_lora(W, 2, 1.0, iterations=0), "iterations must be at least 1, got 0"),
        (lambda: loftq(W, 2, 1.0, format="nf3"), "unknown format 'nf3'"),
        (lambda: lq_lora(W[:, :5], 2, 1.0), r"K is odd in \(4, 5\)"),
        (lambda: lq_lora(W, 2, 1.0, fisher=(torch.ones(6), torch.ones(6))), r"\(4, 6\), got row \(6,\)"),
        (lambda: lq_lora(W, 2, 1.0, fisher=(torch.ones(4), torch.ones(6, 1))), r"\(4, 6\), got column \(6, 1\)"),
        (lambda: lq_lora(W, 2, 1.0, fisher=(torch.arange(4.0), torch.ones(6))), "row weights .* got 0 to 3.*clamp"),
        (lambda: lq_lora(W, 2, 1.0, fisher=(torch.ones(4), -torch.ones(6))), "column weights .* got -1 to -1"),
        (lambda: lq_lora(W, 2, 1.0, fisher=(torch.full((4,), math.nan), torch.ones(6))), "row weights .* got nan"),
        (lambda: pissa(torch.full((4, 6), 3e38), 2, 1.0), "A overflows torch.float32"),
        (lambda: olora(torch.full((4, 6), 3e38), 2, 1.0), "A overflows torch.float32"),
        (lambda: olora(torch.full((4, 6), 6e4).half(), 2, 50.0), "W - s·B A overflows torch.float16"),
    ],
)
def test_bad_arguments_of_one_scheme_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
