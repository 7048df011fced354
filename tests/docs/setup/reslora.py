"""The names that docs/reslora.md takes for granted."""

import copy

import torch
from support.residual_models import fill
from torch import nn


class Named(nn.Module):
    """Blocks whose layers are called q_proj and v_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)}) for _ in range(3)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer["q_proj"](x)) * layer["v_proj"](x)
        return x


model = Named()
other = copy.deepcopy(model)
x = inputs = torch.randn(16, 8)
train = fill
