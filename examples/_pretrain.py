"""Text as bytes, a Llama small enough to pretrain in seconds, and what a training has added to its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from _docs import gather, split
from _lm import log_likelihood
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels.models.pairs import pairs

LENGTH = 64  # bytes of a sequence


@dataclass(frozen=True)
class Data:
    """Sequences of bytes, each [count, LENGTH]."""

    train: Tensor
    choose: Tensor
    """Held-out text for the curves and for choosing learning rates."""
    test: Tensor
    """Other held-out text, for the table."""


def load_data(rows: int) -> Data:
    """Return the prose of the standard library's documentation, with `rows` sequences in each of the held-out parts."""
    texts = split(gather()["prose"])
    held_out = as_bytes(texts.held_out)
    return Data(as_bytes(texts.train), held_out[:rows], held_out[rows : 2 * rows])


def as_bytes(texts: list[str]) -> Tensor:
    """Return the bytes of texts, one text after the other, as sequences of LENGTH."""
    stream = torch.frombuffer(bytearray("\n\n".join(texts).encode()), dtype=torch.uint8).long()
    return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)


def make_model(seed: int) -> LlamaForCausalLM:
    """Return a random Llama of two layers. It reads bytes, so that three quarters of its 133,000 parameters are in the
    linears."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            use_cache=False,
        )
    )


def perplexity(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Return exp of the mean negative log-likelihood of a byte."""
    total, count = log_likelihood(model, rows)
    model.train()
    return math.exp(-total / count)


@torch.no_grad()
def linear_weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Return the weight of each linear of the layers in fp64, with its adapter merged: W + s·B A."""
    weights = {
        name: module.weight.double()
        for name, module in model.named_modules()
        if name.endswith("_proj") and isinstance(module.weight, Tensor)
    }
    for pair in pairs(model):
        weights[pair.name] += pair.scale * pair.b.double() @ pair.a.double()
    return weights


def spectra(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the singular values of each ΔW, which is the difference of two results of `linear_weights`."""
    return {name: torch.linalg.svdvals(after[name] - before[name]) for name in before}


def above(values: Tensor, share: float = 0.01) -> int:
    """Return how many singular values are above `share` of the largest."""
    return int((values > share * values.max()).sum().item())
