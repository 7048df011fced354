"""The names that docs/qlora.md takes for granted."""

import bitsandbytes
import peft
import torch

x = torch.randn(6, 64)
weight, bias = torch.randn(48, 64), torch.randn(48)
lora_a, lora_b = torch.randn(8, 64), torch.randn(48, 8)
linear = torch.nn.Linear(64, 48)
model = torch.nn.Sequential(torch.nn.Linear(64, 48))
frozen = bitsandbytes.nn.Linear4bit(64, 48, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
peft_model = peft.get_peft_model(torch.nn.Sequential(frozen), peft.LoraConfig(r=8, target_modules=["0"]))
