"""Times of calls on a machine that is never quiet: variants are interleaved in rounds and compared within a round.

A round times every variant once and the floor (the variant that all others are compared with) twice, half a round
apart. The order turns by one place from round to round, and every other round runs backwards. Whatever slows the
machine for a while slows the whole round. The number to trust is therefore the median over rounds of time / floor of
the same round, and not the quotient of two medians.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

Step = Callable[[], object]

SAMPLE_SECONDS = 0.002
"""A sample repeats its call until it lasts about this long."""

SLOW, SLOW_ROUNDS = 10, 3
"""A variant that takes SLOW times as long as the floor is measured in the first SLOW_ROUNDS rounds only."""


class Timer(Protocol):
    """Measures how long a call takes."""

    def sample(self, steps: Sequence[Step], repeats: int) -> float:
        """Make `repeats` calls, of each of `steps` in turn. Return seconds per call."""


class CpuTimer:
    """Times by the monotonic clock of the process."""

    def sample(self, steps: Sequence[Step], repeats: int) -> float:
        """Make `repeats` calls, of each of `steps` in turn. Return seconds per call."""
        count = len(steps)
        start = time.perf_counter()
        for i in range(repeats):
            steps[i % count]()
        return (time.perf_counter() - start) / repeats


class CudaTimer:
    """Times by events on the current stream: the time of the GPU, or of Python that feeds it if that is longer."""

    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def sample(self, steps: Sequence[Step], repeats: int) -> float:
        """Make `repeats` calls, of each of `steps` in turn. Return seconds per call."""
        count = len(steps)
        torch.cuda.synchronize()
        self._start.record()
        for i in range(repeats):
            steps[i % count]()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1000 / repeats


class GraphTimer(CudaTimer):
    """Times by events around replays of a CUDA graph that holds many calls: what the GPU needs, without Python and
    without launches in between."""

    CALLS = 32
    """The least number of calls in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self._graphs: dict[int, tuple[Sequence[Step], torch.cuda.CUDAGraph, int]] = {}

    def capture(self, steps: Sequence[Step]) -> None:
        """Capture calls of `steps` in turn. Raises what torch raises if a step cannot be captured."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # first calls choose, compile and allocate; these must not be captured
            for _ in range(2):
                for step in steps:
                    step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph, calls = torch.cuda.CUDAGraph(), len(steps) * math.ceil(self.CALLS / len(steps))
        with torch.cuda.graph(graph):
            for i in range(calls):
                steps[i % len(steps)]()
        self._graphs[id(steps)] = (steps, graph, calls)

    def sample(self, steps: Sequence[Step], repeats: int) -> float:
        """Replay about `repeats` calls, captured before if they are not yet. Return seconds per call."""
        if id(steps) not in self._graphs:
            self.capture(steps)
        _, graph, calls = self._graphs[id(steps)]
        return super().sample([graph.replay], math.ceil(repeats / calls)) / calls


def timer_for(device: torch.device) -> Timer:
    """Return the timer for a type of device."""
    return CudaTimer() if device.type == "cuda" else CpuTimer()


def operand_sets(device: torch.device, bytes_per_set: int) -> int:
    """Return the number of sets of operands to go through in turn so that a GPU finds none of them in its L2 cache.

    It is 1 on a CPU: the last-level cache is shared, and the floor finds its operands there as the variants do.
    """
    if device.type != "cuda":
        return 1
    return max(1, min(64, math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / bytes_per_set)))


@dataclass(frozen=True)
class Rounds:
    """The times that were measured, round by round. Slow variants are in the first rounds only."""

    floor: str
    """The name of the variant that is timed twice a round."""
    samples: list[dict[str, list[float]]]
    """Seconds per call, by round and variant."""
    repeats: dict[str, int]
    """The number of calls in a sample, by variant."""

    def seconds(self, name: str) -> list[float]:
        """Return seconds per call of a variant, one for each round."""
        return [statistics.fmean(taken[name]) for taken in self.samples if taken[name]]

    def ratios(self, name: str, to: str) -> list[float]:
        """Time of one variant / time of another in the same round, one for each round that has both."""
        common = [taken for taken in self.samples if taken[name] and taken[to]]
        return [statistics.fmean(taken[name]) / statistics.fmean(taken[to]) for taken in common]

    def noise(self) -> list[float]:
        """Return the second time of the floor / its first, one for each round: how far noise moves a ratio of 1."""
        return [second / first for first, second in (taken[self.floor] for taken in self.samples)]


def interleave(
    floor: str,
    steps: Mapping[str, Sequence[Step]],
    rounds: int,
    timer: Timer,
    advance: Callable[[], None] = lambda: None,
    doing: Callable[[str], None] = lambda name: None,
) -> Rounds:
    """Time the variants in `steps`: name → one call for each set of operands.

    `advance` is called after every round and `doing` before each sample of a variant. Neither is timed.
    """
    estimates = {}
    for name, each in steps.items():
        doing(name)
        timer.sample(each, len(each))  # first calls choose, compile and allocate
        estimates[name] = timer.sample(each, len(each))
    repeats = {name: max(1, math.ceil(SAMPLE_SECONDS / estimate)) for name, estimate in estimates.items()}
    last_round = {name: SLOW_ROUNDS if estimates[name] > SLOW * estimates[floor] else rounds for name in steps}
    order = _with_two_floors(floor, [name for name in steps if name != floor])
    samples = []
    with _quiet():
        for index in range(rounds):
            taken: dict[str, list[float]] = {name: [] for name in steps}
            for name in (name for name in turned(order, index) if index < last_round[name]):
                doing(name)
                taken[name].append(timer.sample(steps[name], repeats[name]))
            samples.append(taken)
            advance()
    return Rounds(floor, samples, repeats)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (lower quartile, median, upper quartile)."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def turned(order: Sequence[str], index: int) -> list[str]:
    """Return the order of round `index`: `order` turned by `index` places, and backwards in odd rounds."""
    place = index % len(order)
    result = [*order[place:], *order[:place]]
    return result[::-1] if index % 2 else result


def _with_two_floors(floor: str, others: list[str]) -> list[str]:
    half = (len(others) + 1) // 2
    return [floor, *others[:half], floor, *others[half:]]


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch garbage collection off."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
