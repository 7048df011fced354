"""The names that docs/dora.md takes for granted."""

import torch
from support.page_names import bias, linear, lora_a, lora_b, weight, x

magnitude = torch.linalg.vector_norm(weight, dim=1)
model = torch.nn.Sequential(torch.nn.Linear(64, 48))
