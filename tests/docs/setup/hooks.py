"""The names that docs/hooks.md takes for granted."""

import pytest
import torch
from support.peft_models import fused_layers, make

import lora_kernels

pytest.importorskip("accelerate", reason="accelerate is not installed")

x = torch.randn(5, 24)
model, another = make(), make()
lora_kernels.fuse(another)
