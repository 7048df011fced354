"""The floor under a time: what the fastest GEMM at hand and the machine's own copy would need for the same work.

    FLOPs   forward 2·M·K·N + 2·M·R·(K+N)           backward, W frozen: 2·M·K·N + 4·M·R·(K+N)
    bytes   forward e·(M·K + M·N + K·N)             backward e·(2·M·K + 2·M·N + K·N)

for x [M,K], w [N,K], rank R and e bytes an element; terms of size R are left out of the bytes. The frozen layer has no
terms in R, and its backward, to x only, moves e·(M·K + M·N + K·N). A pass cannot end before FLOPs / (the measured GEMM
rate) nor before bytes / (the measured copy rate): the larger is its floor, and floor / time the fraction reached.
Operands that stay in a cache between calls can beat the second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from lora_kernels.bench.shapes import BACKWARD, Shape
from lora_kernels.testing.names import SHORT
from lora_kernels.testing.timing import timer_for

_SAMPLES = 5


class Floor(NamedTuple):
    """The least a pass can take on this machine."""

    seconds: float
    bound: str
    """"FLOPs" or "bytes": what it is bound by, of a forward + backward its larger half."""


def measure_rates(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """{"gemm": {"bf16": FLOP/s, ...}, "copy": bytes/s (read and written)} on random data: the best of five samples, of
    torch's GEMM and, where the CPU back-end has one of its own, of that."""
    timer = timer_for(device)
    size, repeats, count = (8192, 10, 1 << 29) if device.type == "cuda" else (1024, 2, 1 << 25)

    def best(step: Any, calls: int) -> float:
        timer.sample([step], 2)
        return min(timer.sample([step], calls) for _ in range(_SAMPLES))

    gemm = {}
    for dtype in dict.fromkeys(dtypes):
        x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        times = [best(functools.partial(each, x, w), repeats) for each in _gemms(device, dtype)]
        gemm[SHORT[dtype]] = 2 * size**3 / min(times)
    source = torch.randint(0, 127, (count,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return {"gemm": gemm, "copy": 2 * count / best(lambda: target.copy_(source), repeats)}


def _gemms(device: torch.device, dtype: torch.dtype) -> list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    if device.type == "cpu" and dtype == torch.float32:
        try:
            from lora_kernels.backends.cpu.gemm import own
        except ImportError:  # not built
            pass
        else:
            return [torch.nn.functional.linear, own]
    return [torch.nn.functional.linear]


def floor(shape: Shape, which: str, rates: dict[str, Any], frozen: bool = False) -> Floor:
    """Of one pass over `shape`; `frozen`: of the frozen layer's."""
    M, K, N, R, e = shape.M, shape.K, shape.N, 0 if frozen else shape.R, shape.dtype.itemsize
    reuse = 1 if frozen else 2
    work = [(2 * M * K * N + 2 * M * R * (K + N), e * (M * K + M * N + K * N))]
    if which == BACKWARD:
        work.append((2 * M * K * N + 4 * M * R * (K + N), e * (reuse * (M * K + M * N) + K * N)))
    passes = [(flops / rates["gemm"][SHORT[shape.dtype]], count / rates["copy"]) for flops, count in work]
    arithmetic, traffic = max(passes, key=max)
    return Floor(sum(map(max, passes)), "FLOPs" if arithmetic >= traffic else "bytes")
