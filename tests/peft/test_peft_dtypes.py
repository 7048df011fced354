"""For every combination of dtypes, with autocast and without, fused layers give PEFT's results or its errors."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")

from lora_kernels import fuse  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRECISION = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.02}


def outcome(model: nn.Module, x: Tensor, autocast: torch.dtype | None) -> list[Tensor] | type[Exception]:
    """Return y and the gradients, or the type of the error raised."""
    x = x.clone().requires_grad_()
    try:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            y = model(x)
        y.float().square().sum().backward()
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error)
    return [y.detach(), x.grad, *(p.grad for name, p in model.named_parameters() if "lora_" in name)]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", DTYPES)
def test_what_peft_serves_is_served(weight, autocast, use_dora):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False, use_dora=use_dora)
    served = 0
    for x_dtype, adapter in itertools.product(DTYPES, DTYPES):
        plain = peft.get_peft_model(nn.Sequential(nn.Linear(40, 24, dtype=weight)), config)
        for name, p in plain.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(adapter)
        fused, x = copy.deepcopy(plain), torch.randn(3, 40, dtype=x_dtype)
        fuse(fused, strict=True)
        want, got = outcome(plain, x, autocast), outcome(fused, x, autocast)
        if isinstance(want, type):
            assert got is want, (x_dtype, adapter)
            continue
        served += 1
        precision = max(PRECISION[t] for t in (weight, x_dtype, adapter, autocast) if t is not None)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype, (x_dtype, adapter)
            assert (a.float() - b.float()).abs().max() <= precision * b.float().abs().max(), (x_dtype, adapter)
    assert served
