"""Where a job draws its batches from, and how far it has got."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lora_kernels.jobs.job import Job

State = dict[str, Any]
"""How far a source has got: tensors, numbers, texts, lists and dictionaries of them."""


def source_of(job: Job) -> Samples | Batches:
    """Return the source of a job's batches. Raises TypeError or ValueError for data that it cannot draw from."""
    data = job.data
    if job.batch_size is None:
        if not hasattr(data, "__iter__"):
            raise TypeError(
                f"job {job.name!r}: data must be an iterable of batches, got a {type(data).__name__}. For a dataset of "
                "samples give batch_size too"
            )
        return Batches(job)
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(
            f"job {job.name!r}: with batch_size, data must be a dataset with data[i] and len(data), got a "
            f"{type(data).__name__}. For an iterable of batches leave batch_size out"
        )
    if not len(data):
        raise ValueError(f"job {job.name!r}: its dataset has no samples")
    return Samples(job)


class Samples:
    """Batches of a dataset's samples, in a new random order in each pass. The order depends on the job's seed alone."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._generator = torch.Generator().manual_seed(job.seed)
        self._before = self._generator.get_state()
        self._order: list[int] = []
        self._position = 0
        self._passes = 0

    def draw(self) -> Any:
        """Return the next batch, or None at the end of the data."""
        job, size = self._job, self._job.batch_size
        assert size is not None
        if self._position >= len(self._order):
            if self._passes and job.steps is None:
                return None
            self._begin()
        chosen = self._order[self._position : self._position + size]
        batch = job.collate([job.data[i] for i in chosen])
        self._position += size
        return batch

    def _begin(self) -> None:
        """Begin a pass."""
        self._before = self._generator.get_state()
        self._order = torch.randperm(len(self._job.data), generator=self._generator).tolist()
        self._position = 0
        self._passes += 1

    def state(self) -> State:
        """Return how far the source has got."""
        return {
            "samples": len(self._job.data),
            "passes": self._passes,
            "position": self._position,
            "generator": self._before,
        }

    def load(self, state: State) -> None:
        """Go on where `state` was taken. Raises ValueError for the state of another dataset."""
        kept, here = state["samples"], len(self._job.data)
        if kept != here:
            raise ValueError(f"job {self._job.name!r} was saved with {kept} samples, and its dataset has {here} now")
        self._generator.set_state(state["generator"])
        self._passes = state["passes"] - 1
        if state["passes"]:
            self._begin()
        else:
            self._passes = 0
        self._position = state["position"]


class Batches:
    """The batches of an iterable, in its own order."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._iterator: Iterator[Any] | None = None
        self._drawn = 0
        self._passes = 0

    def draw(self) -> Any:
        """Return the next batch, or None at the end of the data."""
        if self._iterator is None:
            self._begin()
        assert self._iterator is not None
        batch = next(self._iterator, None)
        if batch is None and self._job.steps is not None and self._drawn and iter(self._job.data) is not self._job.data:
            self._begin()
            batch = next(self._iterator, None)
        self._drawn += batch is not None
        return batch

    def _begin(self) -> None:
        self._iterator = iter(self._job.data)
        self._passes += 1
        self._drawn = 0

    def state(self) -> State:
        """Return how far the source has got: what ``data.state_dict()`` returns if there is such a method, else the
        number of batches of this pass."""
        tells = getattr(self._job.data, "state_dict", None)
        return {"passes": self._passes, "drawn": self._drawn, "own": tells() if callable(tells) else None}

    def load(self, state: State) -> None:
        """Go on where `state` was taken: by ``data.load_state_dict``, or else by passing over as many batches as were
        drawn, which is right for data that give the same batches in each run.

        Raises ValueError where the data end before that."""
        if state["own"] is not None:
            self._job.data.load_state_dict(state["own"])
        if not state["passes"]:
            return
        self._begin()
        assert self._iterator is not None
        if state["own"] is None:
            for i in range(state["drawn"]):
                if next(self._iterator, None) is None:
                    raise ValueError(
                        f"job {self._job.name!r} was saved after {state['drawn']} batches of a pass, and its data have "
                        f"{i} now"
                    )
        self._passes, self._drawn = state["passes"], state["drawn"]


def generator_of(seed: int, purpose: int) -> torch.Generator:
    """Return a generator of random numbers for one purpose of a job, apart from those of its other purposes."""
    return torch.Generator().manual_seed((seed + purpose * 0x9E3779B97F4A7C15) % 2**63)
