"""Over a base in 16 bits, the gradients of PEFT's fp32 adapters are as near to the truth in a fused layer as in PEFT's
own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")

from lora_kernels import fuse  # noqa: E402
from lora_kernels.core.accuracy import rms  # noqa: E402

N, K = 96, 160


def gradients(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).backward(dy)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "dora of a large ΔW", "two adapters"])
def test_gradients_are_as_near_as_pefts(kind, bias, dtype, isa):
    dora = kind.startswith("dora")
    alpha = 800 if "large" in kind else 8
    config = peft.LoraConfig(r=8, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False, use_dora=dora)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N, bias, dtype=dtype)), config)
    if kind == "two adapters":
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    x, dy = torch.randn(128, K).to(dtype), torch.randn(128, N).to(dtype)
    want = gradients(copy.deepcopy(model).double(), x.double(), dy.double())
    theirs = gradients(model, x, dy)
    for backend in ("cpu", "eager"):
        fused = copy.deepcopy(model)
        fuse(fused, strict=True, backend=backend)
        for name, got in gradients(fused, x, dy).items():
            assert got.dtype == torch.float32
            errors = [rms(each[name].double() - want[name]) for each in ({name: got}, theirs)]
            assert errors[0] <= 1.25 * errors[1], (backend, name, errors)
