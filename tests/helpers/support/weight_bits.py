"""Weights to quantise, and their bits."""

from __future__ import annotations

import torch
from torch import Tensor

FOUR_BIT = ("nf4", "fp4")
TINY = torch.finfo(torch.float32).tiny


def bits(t: Tensor) -> Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def gaussian(N: int, K: int, dtype: torch.dtype = torch.float32, magnitude: float = 1.0) -> Tensor:
    return (torch.randn(N, K) * magnitude).to(dtype)
