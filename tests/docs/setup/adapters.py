"""The names that docs/recipes/adapters.md takes for granted, and the adapters that it reads."""

import copy
from pathlib import Path

import peft
import torch
from support import page_models
from support.adapter_models import adapted

import lora_kernels

model = page_models.llama().requires_grad_(False)
for name, r in {"french": 4, "formal": 8}.items():
    with torch.enable_grad():
        lora_kernels.save_adapter(
            adapted(copy.deepcopy(model), r=r, target_modules="all-linear"), Path("adapters", name)
        )
input_ids = torch.ones(3, 5, dtype=torch.int64)
small = page_models.llama()
batches = [{key: torch.tensor([row[key]]) for key in row} for row in page_models.tokenised(6)]
