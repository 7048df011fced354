"""The random calls of `benchmarks.endurance`, drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from lora_kernels.testing.judge import Problem, problem
from lora_kernels.testing.names import SHORT

DTYPES = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)]
DTYPES += [(torch.float16, torch.float32), (torch.float32, torch.float32)]
MOST = {"cuda": (1536, 2048), "cpu": (96, 160)}
"""The largest M, and the largest N and K, by device type."""


@dataclass(frozen=True)
class Case:
    """One random call. It is a function of (seed, k, kinds) and the type of device."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    p: float
    bias: bool
    strided: bool
    stream: int
    """The stream of a GPU; 0 is the current one."""

    def __str__(self) -> str:
        adapters = SHORT[self.adapter_dtype]
        return (
            f"M={self.M} N={self.N} K={self.K} R={self.R} {SHORT[self.dtype]}, {adapters} adapters, p={self.p:g}"
            f"{', bias' if self.bias else ''}{', strided' if self.strided else ''}, stream {self.stream}"
        )

    def problem(self, seed: int, device: torch.device) -> Problem:
        """Return the operands of the call."""
        return problem(
            self.M,
            self.N,
            self.K,
            self.R,
            dtype=self.dtype,
            adapter_dtype=self.adapter_dtype,
            p=self.p,
            bias=self.bias,
            strided=self.strided,
            seed=seed,
            device=device,
        )


def draw(seed: int, k: int, kinds: int, device: str) -> Case:
    """Return case k. Its kind, k % kinds, draws dtypes, p, strides, bias and ranges of rank and rows; k draws the
    sizes."""
    kind, size = random.Random(f"{seed} kind {k % kinds}"), random.Random(f"{seed} case {k}")
    dtype, adapter_dtype = kind.choice(DTYPES)
    multiple = kind.choice((64, 16, 8, 1))
    strided, bias, p = kind.random() < 0.3, kind.random() < 0.5, kind.choice((0.0, 0.05, 0.5))
    ranks = kind.choice([(1, 16), (16, 32), (33, 64), (65, 128), (129, 256)])
    most_m, most = MOST[device]
    rows = kind.choice([(0, 16), (17, 64), (65, 512), (513, most_m)]) if most_m > 512 else (0, most_m)

    def some(least: int, most: int) -> int:
        return round(2 ** size.uniform(*(torch.tensor([least, most]).double().log2().tolist())))

    N, K = (-(-some(1, most) // multiple) * multiple for _ in range(2))
    R = size.randint(*ranks)
    R = R // 16 * 16 if multiple >= 16 and ranks[0] > 1 else R
    return Case(size.randint(*rows), N, K, R, dtype, adapter_dtype, p, bias, strided, size.randrange(3))
