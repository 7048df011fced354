"""What a job is: `Job` and the settings of its adapter, `LoRAConfig`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import default_collate

from lora_kernels.models.targets import Names, Rules
from lora_kernels.nn.settings import LoRASettings


@dataclass(frozen=True)
class LoRAConfig:
    """The settings of one job's adapter. The rules and defaults are those of PEFT's ``LoraConfig``, and
    `lora_kernels.apply_lora` documents each of them."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: Names = "all-linear"
    exclude_modules: Names | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: Names | None = None

    def settings(self, adapter_dtype: torch.dtype | None) -> LoRASettings:
        """Return the settings that hold for every layer, but for the patterns."""
        return LoRASettings(self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, adapter_dtype=adapter_dtype)

    @property
    def rules(self) -> Rules:
        """The rules that choose the layers by name, with rank_pattern and alpha_pattern."""
        return Rules(
            self.target_modules,
            self.exclude_modules,
            self.rank_pattern,
            self.alpha_pattern,
            self.layers_to_transform,
            self.layers_pattern,
        )


@dataclass(frozen=True)
class Job:
    """One fine-tuning: an adapter, its data and how it is trained. A `Jobs` trains several of them on one base."""

    name: str
    """The name by which `Jobs` knows it. Any text that is not empty."""
    data: Any
    """With `batch_size`, a dataset of samples (``data[i]`` and ``len(data)``), drawn in a new random order in each
    pass. Without it, an iterable of batches, in its own order. A batch is a tensor, or a tuple or mapping of tensors,
    with one row for each sample."""
    loss: Callable[[Any, Any], Tensor]
    """``loss(outputs, batch)`` returns the loss of the job, one number. It gets the rows of this job alone, of what the
    model returned and of what it was given."""
    config: LoRAConfig = field(default_factory=LoRAConfig)
    """The settings of the adapter."""
    batch_size: int | None = None
    """The number of samples that a step draws from a dataset. The last batch of a pass may be smaller."""
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = torch.optim.AdamW
    """Makes the optimiser from the parameters of the adapter, which are A and B of each layer in turn, as in
    ``partial(torch.optim.AdamW, lr=1e-4)``."""
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    """Makes the schedule of the learning rate from the optimiser. It advances after every step of the optimiser."""
    steps: int | None = None
    """The steps of the optimiser after which the job is finished; the data are passed over as often as that takes. None
    is one pass over the data."""
    accumulation: int = 1
    """The number of batches whose gradients are averaged for one step of the optimiser."""
    max_grad_norm: float | None = None
    """The largest norm of the gradient, by which it is clipped. None does not clip."""
    seed: int = 0
    """The seed of the adapter's first values, of the order of the samples and of dropout. It belongs to this job
    alone, so none of them depends on other jobs."""
    collate: Callable[[list[Any]], Any] = default_collate
    """Makes a batch from a list of samples."""
    on_nonfinite: Literal["pause", "drop"] = "pause"
    """What is done where the loss or the gradient is NaN or infinite. The adapter is not changed by that batch. "pause"
    keeps the job, and `Jobs.resume` goes on with its next batch; "drop" removes it."""

    def check(self) -> None:
        """Raise ValueError or TypeError for a value that no job can have."""
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"the name of a job must be a text that is not empty, got {self.name!r}")
        numbers = (("batch_size", self.batch_size), ("steps", self.steps), ("accumulation", self.accumulation))
        for what, number in numbers:
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ValueError(f"job {self.name!r}: {what} must be an integer of at least 1, got {number!r}")
        norm = self.max_grad_norm
        if norm is not None and not 0 < norm < math.inf:
            raise ValueError(f"job {self.name!r}: max_grad_norm must be a positive number or None, got {norm!r}")
        if self.on_nonfinite not in ("pause", "drop"):
            raise ValueError(f'job {self.name!r}: on_nonfinite must be "pause" or "drop", got {self.on_nonfinite!r}')
        if not isinstance(self.config, LoRAConfig):
            raise TypeError(
                f"job {self.name!r}: config must be a lora_kernels.jobs.LoRAConfig, got a {type(self.config).__name__}"
            )


def next_token_loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean cross entropy of a causal language model: position t of the logits predicts label t + 1. Labels
    of -100 are left out. `outputs` has logits [B, T, V], `batch` labels [B, T]."""
    logits, labels = outputs.logits[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
