"""The names that docs/qlora.md takes for granted."""

import bitsandbytes
import peft
import torch
from support.page_names import bias, linear, lora_a, lora_b, weight, x

model = torch.nn.Sequential(torch.nn.Linear(64, 48))
frozen = bitsandbytes.nn.Linear4bit(64, 48, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
peft_model = peft.get_peft_model(torch.nn.Sequential(frozen), peft.LoraConfig(r=8, target_modules=["0"]))
