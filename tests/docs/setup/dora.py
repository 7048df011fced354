"""The names that docs/dora.md takes for granted."""

import torch

x = torch.randn(6, 64)
weight, bias = torch.randn(48, 64), torch.randn(48)
lora_a, lora_b = torch.randn(8, 64), torch.randn(48, 8)
linear = torch.nn.Linear(64, 48)
magnitude = torch.linalg.vector_norm(weight, dim=1)
model = torch.nn.Sequential(torch.nn.Linear(64, 48))
