"""Small models of bitsandbytes' 4-bit and 8-bit linears, with PEFT's adapters on them."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from peft import PeftModel, get_peft_model
from support.peft_models import config, randomise
from torch import nn


class Net(nn.Module):
    """A net that is quantised on the CPU.

    Every K is a multiple of the blocksize, because with another K the AVX512 code of bitsandbytes does not compute what
    its own dequantisation says. Every N is a multiple of 32, as that code needs in eval mode.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__()
        kwargs = {"compute_dtype": torch.float32, "quant_type": "nf4"} | kwargs
        self.up, self.down = bnb.nn.Linear4bit(64, 128, **kwargs), bnb.nn.Linear4bit(128, 64, bias=False, **kwargs)
        self.is_loaded_in_4bit = True
        self.to("cpu")

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Net8(nn.Module):
    def __init__(self, has_fp16_weights: bool = False) -> None:
        super().__init__()
        self.up = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=has_fp16_weights)
        self.down = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=has_fp16_weights, threshold=6.0)
        self.is_loaded_in_8bit = True
        self.to("cpu")

    forward = Net.forward


def make(net: nn.Module | None = None, **kwargs) -> PeftModel:
    """Return a PEFT model in training mode, where bitsandbytes does not re-pack its weight."""
    model = get_peft_model(net or Net(), config(**kwargs), autocast_adapter_dtype=False)
    randomise(model)
    return model.train()
