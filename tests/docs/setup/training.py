"""The names that docs/training.md takes for granted."""

import torch
from peft import LoraConfig, get_peft_model
from support.page_names import Attention
from support.page_names import x as x
from torch import nn

import lora_kernels


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 64)

    def forward(self, inputs):
        return self.down(torch.tanh(self.up(inputs)))


model = Net()
two_modalities = get_peft_model(Attention(), LoraConfig(target_modules=["q_proj", "v_proj"]), adapter_name="audio")
two_modalities.add_adapter("image", LoraConfig(target_modules=["q_proj", "v_proj"]))
two_modalities.base_model.set_adapter(["audio", "image"])
lora_kernels.fuse(two_modalities)
tokens, labels = torch.randn(4, 9, 64), torch.tensor([1, 2, 3, 4])
