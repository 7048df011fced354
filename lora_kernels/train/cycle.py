"""`Cycle`: restarts at every so many steps of a training that someone else's loop runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.models.pairs import pairs
from lora_kernels.train import prune as pruning
from lora_kernels.train import restartable
from lora_kernels.train.restart import RestartReport, carry_out


class Cycle:
    """What the callbacks of HF Trainer and Lightning do.

    Attributes:
        reports: the step and the `RestartReport` of each restart in this process.
        master: W in fp32 by layer, or None where none is kept.
    """

    def __init__(self, every: int, prune: float, how: str, seed: int, master: bool) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a number of steps of at least 1, got {every!r}")
        pruning.check(prune, how)
        self.every, self.prune, self.how, self.seed = every, prune, how, seed
        self.master: dict[str, Tensor] | None = {} if master else None
        self.reports: list[tuple[int, RestartReport]] = []

    def begin(self, model: nn.Module, step: int, steps: float) -> None:
        """Prepare for a training that goes on at `step` and ends after `steps`, which may be infinite. Raises
        ValueError where `restart` would refuse the model, so that a training does not stop at its first restart."""
        updates, _ = restartable.updates_of(model)
        if step >= self.every:
            restartable.mark(model, updates)
        if steps <= self.every:
            warnings.warn(
                f"every={self.every}, but the training ends after {steps} steps: there will be no restart", stacklevel=3
            )

    def is_due(self, step: int, steps: float) -> bool:
        """Return whether there is a restart after this many steps. After the last one there is none."""
        return step > 0 and step % self.every == 0 and step != steps

    def restart(self, model: nn.Module, optimizers: Sequence[Any], step: int) -> None:
        """Do the restart that is due after `step` steps. A, B and what is pruned depend on the seed and on `step`
        alone, so that a training which goes on from a checkpoint draws the same."""
        number = step // self.every
        seeds = torch.randint(2**32, (number,), generator=torch.Generator().manual_seed(self.seed))
        generator = torch.Generator().manual_seed(int(seeds[-1].item()))
        _warn_of_rates(model, optimizers, step, self.every)
        report, _ = carry_out(model, list(optimizers), self.prune, self.how, generator, self.master)
        self.reports.append((step, report))


def _warn_of_rates(model: nn.Module, optimizers: Iterable[Any], step: int, every: int) -> None:
    """Warn where the next step is made with a learning rate that is not 0."""
    trained = {id(p) for pair in pairs(model) for p in (pair.a, pair.b)}
    rates = [
        float(group["lr"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        if "lr" in group and any(id(p) in trained for p in group["params"])
    ]
    if any(rate > 0 for rate in rates):
        warnings.warn(
            f"the learning rate at the restart after step {step} is {max(rates):g}, and not 0. Without a new warm-up "
            f"training may diverge: use LambdaLR(optimizer, jagged_cosine(steps, every={every}, ...)), stepped after "
            "every step of the optimiser",
            stacklevel=4,
        )
