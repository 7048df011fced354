"""Models, a tokenizer and data sets so small that the code of the recipes runs in seconds. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of ten words."""
    words = ["<pad>", "<eos>", "<unk>", *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def llama(**more: Any) -> LlamaForCausalLM:
    """Return a Llama with one layer, whose weights can be quantised in blocks of 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=16, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, **sizes | more)
    return LlamaForCausalLM(config)


def tokenised(count: int = 4) -> list[dict[str, list[int]]]:
    """Return rows of token ids with their labels."""
    return [{"input_ids": row, "labels": row} for row in ([3 + i % 10, 4, 5, 6, 7, 1] for i in range(count))]


def save_llama(folder: str | Path) -> str:
    """Save a Llama and its tokenizer into `folder`, and return its name."""
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
