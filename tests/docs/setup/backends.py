"""The names that docs/backends.md takes for granted."""

import torch

x = torch.randn(6, 64)
weight, bias = torch.randn(48, 64), torch.randn(48)
lora_a, lora_b = torch.randn(8, 64), torch.randn(48, 8)
linear = torch.nn.Linear(64, 48)
