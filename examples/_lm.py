"""A small language model of the Llama architecture, its tokenizer, its training and its perplexity."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

LENGTH = 128
VOCABULARY = 1024
END = "<|end|>"


class Sequences(Dataset):
    """The tokens of texts, one text after the other, cut into sequences of LENGTH."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
        tokens = itertools.chain.from_iterable(tokenizer([text + END for text in texts])["input_ids"])
        stream = torch.tensor(list(tokens))
        self.rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_model() -> LlamaForCausalLM:
    """Return a random model with four layers and 2.2 million parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            use_cache=False,
        )
    )


def train(model: nn.Module, data: Sequences, *, steps: int, batch: int, lr: float, out: Path) -> Trainer:
    """Train with Hugging Face's Trainer, and return it."""
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        logging_steps=max(steps // 5, 1),
        save_strategy="no",
        report_to=[],
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return trainer


@torch.no_grad()
def log_likelihood(model: nn.Module, rows: Tensor) -> tuple[float, int]:
    """Return the sum over all tokens of log p(token | tokens before it), and the number of tokens."""
    model.eval()
    total, count = 0.0, rows.shape[0] * (rows.shape[1] - 1)
    for part in rows.split(32):
        logits = model(input_ids=part).logits[:, :-1].float()
        total += logits.log_softmax(-1).gather(-1, part[:, 1:, None]).sum().item()
    return total, count


def perplexity(model: nn.Module, data: Sequences) -> float:
    """Return exp of the mean negative log-likelihood of a token, over the first 128 sequences."""
    device = next(model.parameters()).device
    total, count = log_likelihood(model, data.rows[:128].to(device))
    return math.exp(-total / count)
