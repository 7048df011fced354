"""Small models and jobs for the tests of `lora_kernels.jobs`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.jobs import Job, Jobs, LoRAConfig

K, CLASSES = 12, 4


class Classifier(nn.Module):
    """Two layers and a head, for x [B, K] or [B, S, K]."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(K, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.two(F.gelu(self.one(x)))))


class Reader(nn.Module):
    """A causal language model of one block of attention, which leaves padding out by its attention mask."""

    def __init__(self, vocabulary: int = 20, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.fc = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        T = x.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool).tril() & attention_mask.bool()[:, None, :]
        x = x + self.o_proj(F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), seen))
        return {"logits": self.head(x + F.gelu(self.fc(x)))}


def classifier(dtype: torch.dtype = torch.float64) -> Classifier:
    torch.manual_seed(0)
    return Classifier().to(dtype)


def samples(n: int = 24, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(K, generator=g, dtype=dtype), torch.randint(CLASSES, (), generator=g)) for _ in range(n)]


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def job(i: int, name: str | None = None, dtype: torch.dtype = torch.float64, **changed: Any) -> Job:
    """A job unlike the others: other data, rank, dropout, batch size, learning rate, schedule and clipping."""
    settings: dict[str, Any] = {
        "config": LoRAConfig(r=(2, 8, 3, 5)[i % 4], lora_alpha=8 + i, lora_dropout=(0, 0.3, 0.1, 0)[i % 4]),
        "batch_size": 3 + i,
        "optimizer": partial(torch.optim.AdamW, lr=0.01 * (i + 1)),
        "schedule": None if i % 2 else partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.7),
        "accumulation": 1 + i % 2,
        "max_grad_norm": 0.05 if i < 2 else None,
        "seed": 10 + i,
        "steps": 6,
    }
    return Job(name or f"job {i}", samples(seed=i, dtype=dtype), cross_entropy, **(settings | changed))


def weights(jobs: Jobs, name: str) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in jobs.parameters(name).items()}


def losses(jobs: Jobs, steps: int) -> dict[str, list[float]]:
    """Make steps, and return the losses of each job."""
    found: dict[str, list[float]] = {}
    for _ in range(steps):
        for name, now in jobs.step().items():
            if now.loss is not None:
                found.setdefault(name, []).append(now.loss)
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
