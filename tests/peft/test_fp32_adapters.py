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
            # Which of two sums in fp32 is nearer depends on the order of the processor's GEMM. Rounding h or dy to 16
            # bits costs hundreds of times as much.
            rounding = 4 * torch.finfo(torch.float32).eps * rms(want[name])
            assert errors[0] <= max(1.25 * errors[1], rounding), (backend, name, errors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", ["fp32", "same"])
@pytest.mark.parametrize("biases", [(1.0, 1.0), (900.0, 0.01), (60000.0, 10000.0), (0.0, 1e-9)], ids=str)
def test_a_bias_of_lora_b_loses_no_more_than_in_peft(biases, adapters, dtype):
    """x Wᵀ cancels most of the base's bias. The sum of the two biases may overflow, and has more digits than 16 bits
    hold."""
    of_base, of_b = biases
    config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False, lora_bias=True)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N, dtype=dtype)), config)
    layer = model.base_model.model[0]
    x, dy = torch.randn(128, K).to(dtype), torch.randn(128, N).to(dtype)
    with torch.no_grad():
        layer.base_layer.bias.copy_(of_base * (1 + torch.rand(N) / 16))
        layer.lora_B["default"].bias.copy_(of_b * (1 + torch.rand(N)) / layer.scaling["default"] / 2)
        x[:, 0] = 1 + torch.rand(128) / 32
        layer.base_layer.weight[:, 0] = -layer.base_layer.bias
    if adapters == "same":
        model.to(dtype)
    dy[:, 1::2] *= 1 if dtype == torch.bfloat16 else 300  # sums of dy in fp16 overflow
    dy[:, 3::4] = dy[:, 3::4].abs()
    truth = copy.deepcopy(model).double()
    want = gradients(truth, x.double(), dy.double()) | {"y": truth(x.double()).detach()}
    theirs = gradients(model, x, dy) | {"y": model(x).detach()}
    fused = copy.deepcopy(model)
    report = fuse(fused)
    for name, got in (gradients(fused, x, dy) | {"y": fused(x).detach()}).items():
        assert got.dtype == theirs[name].dtype
        ours, peers = (rms(each.double() - want[name]) for each in (got, theirs[name]))
        assert ours <= 1.25 * peers, (name, ours, peers)
    reason = f"lora_bias beside {dtype}: the sum of the two biases would be rounded to it"
    assert fused.base_model.model[0].passed_over == {reason: 2}
    assert list(report.not_fused.values()) == [reason]


@pytest.mark.parametrize("alphas", [(1, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("adapters", ["fp32", "same"])
def test_two_adapters_of_small_scales_lose_no_more_than_in_peft(adapters, alphas):
    """s times B is not rounded to fp16, and no gradient overflows before it is multiplied by s."""
    made = [
        peft.LoraConfig(r=8, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False, rank_pattern={})
        for alpha in alphas
    ]
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N, dtype=torch.float16)), made[0])
    model.add_adapter("other", made[1])
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model[0]
    for name, alpha in zip(("default", "other"), alphas, strict=True):
        layer.scaling[name] = alpha / 1024
    if adapters == "same":
        model.half()
    x, dy = 40 * torch.rand(128, K).half(), 60 * torch.rand(128, N).half()
    want = gradients(copy.deepcopy(model).double(), x.double(), dy.double())
    theirs = gradients(model, x, dy)
    fused = copy.deepcopy(model)
    fuse(fused, strict=True)
    for name, got in gradients(fused, x, dy).items():
        ours, peers = (rms(each.double() - want[name]) for each in (got, theirs[name]))
        assert ours <= 1.25 * peers, (name, ours, peers)
