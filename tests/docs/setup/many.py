"""The names that docs/many.md takes for granted."""

import torch
from support.page_names import bias, weight, x

ids = torch.tensor([0, 2, -1, 0, 1, 1])
batch = torch.randn(3, 4, 64)
matrices = [(torch.randn(r, 64), torch.randn(48, r)) for r in (4, 8, 16)]
