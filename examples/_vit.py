"""A small vision transformer for 8×8 grey images in plain torch, the model of examples/digits.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 2
TOKENS = (8 // PATCH) ** 2


class Block(nn.Module):
    """Pre-norm attention and MLP. LoRA adapts its six linears."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] → [B, T, C]."""
        z = self.norm1(x)
        q, k, v = (linear(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, width: int = 96, depth: int = 3, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.position = nn.Parameter(0.5 * torch.randn(TOKENS, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 8, 8] → logits [B, classes]."""
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).reshape(-1, TOKENS, PATCH * PATCH)
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))
