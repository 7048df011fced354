"""The names that docs/initialisation.md takes for granted."""

import torch
from support.page_names import Attention

model = Attention()
batches = [(torch.randn(48, 64), torch.randn(48, 64)) for _ in range(2)]
