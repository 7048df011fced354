"""The names that docs/jobs.md takes for granted."""

from dataclasses import dataclass

import torch
from support.job_problems import Reader
from support.page_names import Attention, x
from torch import nn


@dataclass
class Output:
    logits: torch.Tensor


class Causal(Reader):
    """A language model whose output has its logits as an attribute, as those of transformers have."""

    def forward(self, input_ids, attention_mask):
        return Output(**super().forward(input_ids, attention_mask))


model = Attention()
other_model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64))
dataset = [(torch.randn(64), torch.tensor(i % 10)) for i in range(32)]
language_model = Causal()
corpora = {
    f"{length} tokens": [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        for ids in torch.randint(20, (8, length))
    ]
    for length in (6, 9)
}
