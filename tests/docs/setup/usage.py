"""The names that docs/usage.md takes for granted."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
model = get_peft_model(net, LoraConfig(target_modules=["0", "2"]))
x = torch.randn(3, 8)
