"""Operands and a small model that code blocks of the documentation take for granted. `tests/docs/setup` picks for each
page what it uses."""

from __future__ import annotations

import torch

x = torch.randn(6, 64)
weight, bias = torch.randn(48, 64), torch.randn(48)
lora_a, lora_b = torch.randn(8, 64), torch.randn(48, 8)
linear = torch.nn.Linear(64, 48)


class Attention(torch.nn.Module):
    """Two projections whose names PEFT's users know."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.v_proj(x)
