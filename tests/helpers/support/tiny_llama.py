"""A Llama small enough for a test, made from its configuration, and sequences it can learn."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.peft_models import randomise
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            initializer_range=0.2,  # large enough for the adapters to matter to the loss
            use_cache=False,
        )
    )


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | kwargs))


def lora_llama(layers: int = 2, *, random: bool = False, **kwargs) -> PeftModel:
    """Return a Llama with seven adapted linears in each layer. With `random` the adapters differ from zero."""
    model = get_peft_model(llama(layers), lora(**kwargs))
    if random:
        randomise(model, 0.1)
    return model


def sequences(count: int, length: int = 12) -> list[list[int]]:
    """Return sequences in which each token follows from the one before."""
    starts = torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = []
    for token in starts:
        row = [token]
        while len(row) < length:
            row.append((5 * row[-1] + 3) % VOCABULARY)
        rows.append(row)
    return rows
