"""`Runner`: one job in training, with everything that belongs to it alone."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.core.dropout import draw_seeds
from lora_kernels.jobs.data import generator_of, source_of
from lora_kernels.jobs.job import Job
from lora_kernels.jobs.sites import AdapterValues

DROPOUT, VALUES = 1, 2
"""What the generators of a job are for, beside the order of its samples."""

Phase = Literal["training", "paused", "finished", "dropped"]
"""Where a job stands. A dropped one is no longer in its `Jobs`."""


class Progress(NamedTuple):
    """Where a job stands after its last batch."""

    phase: Phase = "training"
    step: int = 0
    """The steps of its optimiser."""
    lr: float = 0.0
    """The learning rate of the optimiser's first group."""
    loss: float | None = None
    """The loss of the last batch."""
    grad_norm: float | None = None
    """The norm of the last gradient of the optimiser, before it was clipped."""
    samples: int = 0
    """The samples of the last batch."""
    reason: str = ""
    """Why the job was paused or dropped."""


class Drawn(NamedTuple):
    """A batch that was drawn and not yet learnt from."""

    batch: Any
    seeds: tuple[Tensor, ...]
    """The seeds of dropout, one for each layer of the job."""


class Runner:
    """One job in training: its adapter, optimiser, schedule, data and random numbers."""

    def __init__(self, job: Job, values: AdapterValues) -> None:
        self.job = job
        self.parameters: dict[str, nn.Parameter] = {}
        for name, (a, b) in values.items():
            self.parameters |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        self.layers = len(values)
        self.rank = max(a.shape[0] for a, _ in values.values())
        self.optimizer = job.optimizer(list(self.parameters.values()))
        known = {id(p) for p in self.parameters.values()}
        given = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        if set(given) - known:
            raise ValueError(f"job {job.name!r}: its optimiser holds parameters that are not those of its adapter")
        self.schedule = None if job.schedule is None else job.schedule(self.optimizer)
        self.source = source_of(job)
        self.dropout = generator_of(job.seed, DROPOUT)
        self.micro = 0
        """The batches whose gradients wait for the next step of the optimiser."""
        self.drawn: Drawn | None = None
        self.progress = Progress(lr=self.lr)

    @property
    def lr(self) -> float:
        """The learning rate of the optimiser's first group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def draw(self) -> Drawn | None:
        """Return the batch that is next, or None at the end of the data. A batch that was drawn for a step which raised
        is drawn again."""
        if self.drawn is None:
            batch = self.source.draw()
            if batch is None:
                self.finish()
                return None
            device = next(iter(self.parameters.values())).device
            self.drawn = Drawn(batch, draw_seeds(self.layers, device, self.dropout))
        return self.drawn

    def learnt(self, loss: float, samples: int) -> bool:
        """Note that the gradient of the drawn batch was added. Return whether a step of the optimiser is due."""
        self.drawn = None
        self.micro += 1
        self.progress = self.progress._replace(loss=loss, samples=samples)
        return self.micro == self.job.accumulation

    def gradients(self) -> list[Tensor]:
        """Return the gradients that there are."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def step(self, norm: float) -> None:
        """Make a step of the optimiser and of the schedule, with gradients of this norm, which is finite."""
        if self.job.max_grad_norm is not None:
            with_gradient = [p for p in self.parameters.values() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(
                with_gradient, self.job.max_grad_norm, torch.tensor(norm, dtype=torch.float64)
            )
        self.optimizer.step()
        self.forget_gradients()
        if self.schedule is not None:
            self.schedule.step()
        self.progress = self.progress._replace(step=self.progress.step + 1, grad_norm=norm, lr=self.lr)
        if self.progress.step == self.job.steps:
            self.finish()

    def forget_gradients(self) -> None:
        """Begin a new window of accumulation."""
        for p in self.parameters.values():
            p.grad = None
        self.micro = 0

    def finish(self) -> None:
        """End the job. Gradients that wait for a step which will not come are forgotten."""
        self.forget_gradients()
        self.progress = self.progress._replace(phase="finished")

    def stop(self, what: str, value: float) -> None:
        """Pause or drop the job, as its `on_nonfinite` says, because its loss or the norm of its gradient is `value`,
        which is no finite number."""
        self.forget_gradients()
        self.drawn = None
        phase: Phase = "paused" if self.job.on_nonfinite == "pause" else "dropped"
        self.progress = self.progress._replace(
            phase=phase, reason=f"its {what} was {value} after {self.progress.step} steps"
        )
