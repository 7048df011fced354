"""The names that docs/serving.md takes for granted, and the adapters that it reads."""

import copy
from pathlib import Path

import torch
from support.adapter_models import adapted, llama

import lora_kernels

model = llama().requires_grad_(False)
for name, r in {"french": 4, "formal": 8, "legal": 16}.items():
    with torch.enable_grad():
        lora_kernels.save_adapter(
            adapted(copy.deepcopy(model), r=r, target_modules="all-linear"), Path("adapters", name)
        )
trained = adapted(copy.deepcopy(model), r=4, target_modules=["q_proj"])
new_weights = {
    f"base_model.model.{name.replace('lora_A', 'lora_A.weight').replace('lora_B', 'lora_B.weight')}": value
    for name, value in trained.state_dict().items()
    if "lora_" in name
}
input_ids = torch.randint(32, (3, 6), generator=torch.Generator().manual_seed(1))
one_prompt = input_ids[:1]
prompts = [[1, 2, 3], [4, 5], [6]]
