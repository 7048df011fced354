"""The bytes that a layer saves for its backward, and the most that a step has allocated at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_kernels.bench.layers import Task, step
from lora_kernels.bench.shapes import BACKWARD
from lora_kernels.testing.judge import Problem


def saved_bytes(task: Task, q: Problem) -> int:
    """Return the bytes of all storages that autograd holds after a forward, each counted once, x included. Parameters
    are not counted."""
    parameters = {t.untyped_storage().data_ptr() for t in (*task.trained, *task.frozen)}
    kept: dict[int, Tensor] = {}  # the tensors are kept, so that no address is used again

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = task.layer(q.x.detach().requires_grad_())
    total = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)
    del y
    return total


def peak_bytes(task: Task, q: Problem) -> int | None:
    """Return the most bytes that one forward + backward has allocated at a time through torch's allocator, with its
    outputs.

    None if torch does not tell. Scratch that native code takes from the system (oneDNN, MKL, the CPU kernels of this
    package) is not counted, for any variant.
    """
    run = step(task, q, BACKWARD)
    run()
    if q.x.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _peak_on_cpu(run)


def _peak_on_cpu(run: Callable[[], object]) -> int | None:
    with (
        _silent_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile,
    ):
        run()
    try:
        events = profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    except AttributeError:  # these names are not part of torch's public interface
        return None
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hide standard error: the native half of the profiler writes a line to it at every start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
