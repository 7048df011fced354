"""The names that docs/merging.md takes for granted."""

import peft
import pytest
import torch

import lora_kernels

torch.manual_seed(0)
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def adapted(linear: torch.nn.Module) -> torch.nn.Module:
    net = torch.nn.Sequential(linear)
    net.is_loaded_in_4bit = isinstance(linear, bnb.nn.Linear4bit)
    return peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))


x = torch.randn(3, 64)
model = adapted(torch.nn.Linear(64, 64))
layer = model.base_model.model[0]
quantised = adapted(bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu"))
lora_kernels.fuse(quantised)
