"""The names that docs/peft.md takes for granted."""

import peft
import pytest
import torch
from support.page_names import Attention, x

import lora_kernels

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


class Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (torch.nn.Linear(64, 64) for _ in range(3))


base, another_base = Attention(), Attention()
custom = peft.get_peft_model(Named(), peft.LoraConfig(r=4, target_modules=["wq", "wk", "wv"]))

config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
many = peft.get_peft_model(Attention(), config, adapter_name="en")
many.add_adapter("de", peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))

sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
llama = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules="all-linear"), adapter_name="en")
lora_kernels.fuse(llama)
