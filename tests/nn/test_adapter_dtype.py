"""The adapters have PEFT's dtype by default: fp32 beside fp16 and bf16. A weight in fp32 or fp64 gives them its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear, QuantizedLoRALinear, quantize_weight
from lora_kernels.models.inject import adapter_parameters, apply_lora

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32, torch.float64]


def adapters(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in adapter_parameters(model)}


def in_bnb(dtype: torch.dtype) -> FusedLoRALinear:
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(64, 8, compute_dtype=dtype, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(torch.randn(8, 64, dtype=dtype), requires_grad=False, quant_type="nf4")
    return FusedLoRALinear.from_bnb(linear.to("cpu"))


def in_model(dtype: torch.dtype, **settings) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 8, dtype=dtype))
    apply_lora(model, **settings)
    return model


MAKERS = {
    "constructor": lambda dtype: FusedLoRALinear(64, 8, dtype=dtype),
    "from_linear": lambda dtype: FusedLoRALinear.from_linear(nn.Linear(64, 8, dtype=dtype)),
    "DoRA": lambda dtype: FusedLoRALinear.from_linear(nn.Linear(64, 8, dtype=dtype), use_dora=True),
    "pissa": lambda dtype: FusedLoRALinear.from_linear(nn.Linear(64, 8, dtype=dtype), init="pissa"),
    "nf4": lambda dtype: FusedLoRALinear.from_linear(nn.Linear(64, 8, dtype=dtype), quant="nf4"),
    "over": lambda dtype: QuantizedLoRALinear.over(quantize_weight(torch.randn(8, 64, dtype=dtype), "int8")),
    "from_bnb": in_bnb,
    "apply_lora": in_model,
    "apply_lora, fp8": lambda dtype: in_model(dtype, quant="fp8"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_beside_16_bits_the_adapter_is_in_fp32(kind, dtype):
    if dtype == torch.float64 and kind not in ("constructor", "from_linear", "DoRA", "apply_lora"):
        pytest.skip("no format and no scheme takes a weight in fp64")
    wanted = torch.float32 if dtype in HALVES else dtype
    assert adapters(MAKERS[kind](dtype)) == {wanted}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weights_own_dtype_can_be_asked_for(dtype):
    assert adapters(FusedLoRALinear(8, 8, dtype=dtype, adapter_dtype=dtype, use_dora=True)) == {dtype}
    assert adapters(in_model(dtype, adapter_dtype=dtype)) == {dtype}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_is_pefts(dtype):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(64, 8, dtype=dtype)), config)
    assert adapters(in_model(dtype)) == {p.dtype for n, p in theirs.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_grad_scaler_steps_an_fp16_model(quant):
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).half()
    apply_lora(model, r=4, quant=quant)
    before = model[0].lora_B.detach().clone()
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with torch.autocast("cpu", torch.float16):
        loss = model(torch.randn(4, 64).half()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 256.0  # nothing overflowed, so the step was made
    assert not torch.equal(model[0].lora_B, before)


def test_every_element_of_a_bf16_models_adapter_moves_at_a_small_learning_rate():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).bfloat16()
    apply_lora(model, r=4)
    nn.init.normal_(model[2].lora_B, std=0.1)
    a = model[2].lora_A
    before, x = a.detach().clone(), torch.randn(32, 64, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([a], lr=1e-5, weight_decay=0)
    for _ in range(10):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (a != before).float().mean() > 0.99
