"""The least time that a pass can take on this machine, from the measured rates of its fastest GEMM and its copy.

    FLOPs   forward 2·M·K·N + 2·M·R·(K+N)           backward, W frozen: 2·M·K·N + 4·M·R·(K+N)
    bytes   forward e·(M·K + M·N + K·N)             backward e·(2·M·K + 2·M·N + K·N)

for x [M,K], w [N,K], rank R and e bytes an element; the bytes leave out terms of size R. The frozen layer has no terms
in R, and its backward, which goes to x only, moves e·(M·K + M·N + K·N). A pass takes at least FLOPs / (the measured
GEMM rate) and at least bytes / (the measured copy rate). The larger of the two is its floor, and floor / time is the
fraction of the roofline that it reaches. Operands that stay in a cache between calls can beat the second bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from lora_kernels.bench.shapes import BACKWARD, Cell
from lora_kernels.testing.names import SHORT
from lora_kernels.testing.timing import timer_for

_SAMPLES = 5


class Floor(NamedTuple):
    """The least time of a pass."""

    seconds: float
    bound: str
    """"FLOPs" or "bytes", whichever bounds the pass; for a forward + backward, its longer half."""


def measure_rates(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """Return {"gemm": {"bf16": FLOP/s, ...}, "copy": bytes/s}; the bytes are those read and those written.

    Each rate is the best of five samples on random data. The GEMM is torch's or, in fp32 on a CPU, our own if that is
    faster.
    """
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

            return [torch.nn.functional.linear, own]
        except ImportError:  # the native kernels are not built
            pass
    return [torch.nn.functional.linear]


def floor(cell: Cell, rates: dict[str, Any], frozen: bool = False) -> Floor:
    """Return the floor of a cell's pass over the layer, or over the frozen layer. `rates` are those of
    `measure_rates`."""
    shape = cell.shape
    M, K, N, R, e = shape.M, shape.K, shape.N, 0 if frozen else shape.R, shape.dtype.itemsize
    reuse = 1 if frozen else 2
    work = [(2 * M * K * N + 2 * M * R * (K + N), e * (M * K + M * N + K * N))]
    if cell.which == BACKWARD:
        work.append((2 * M * K * N + 4 * M * R * (K + N), e * (reuse * (M * K + M * N) + K * N)))
    passes = [(flops / rates["gemm"][SHORT[shape.dtype]], count / rates["copy"]) for flops, count in work]
    arithmetic, traffic = max(passes, key=max)
    return Floor(sum(map(max, passes)), "FLOPs" if arithmetic >= traffic else "bytes")
