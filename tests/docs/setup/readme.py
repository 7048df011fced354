"""The names that README.md takes for granted."""

from pathlib import Path

import torch
from support.adapter_models import adapted, llama
from support.page_names import Attention, bias, linear, lora_a, lora_b, weight, x

import lora_kernels

base = Attention()
model = Attention()

with torch.enable_grad():
    lora_kernels.save_adapter(adapted(llama(), r=4, target_modules="all-linear"), Path("adapters", "french"))
llm, input_ids = llama(), torch.ones(2, 5, dtype=torch.int64)
