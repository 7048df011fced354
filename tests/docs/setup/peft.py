"""The names that docs/peft.md takes for granted."""

import peft
import torch
from support.page_names import Attention, x


class Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (torch.nn.Linear(64, 64) for _ in range(3))


base, another_base = Attention(), Attention()
custom = peft.get_peft_model(Named(), peft.LoraConfig(r=4, target_modules=["wq", "wk", "wv"]))
