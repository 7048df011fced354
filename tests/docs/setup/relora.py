"""The names that docs/relora.md takes for granted."""

import torch
from support.page_names import Attention

model = Attention()


def batches(steps):
    return (torch.randn(2, 5, 64) for _ in range(steps))


def loss(y):
    return y.square().mean()
