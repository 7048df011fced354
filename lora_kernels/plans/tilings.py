"""How the sm_90a kernels may cut y and dx, and which way a call takes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tiling(NamedTuple):
    """Columns of a tile, and thread blocks of a cluster, which load w for each other."""

    columns: int
    cluster: int


BY_RULE = Tiling(0, 0)
"""`tiling` of csrc/cuda/sm90/schedule.h chooses, and the decode kernel serves where it can."""
TILINGS = (Tiling(128, 1), Tiling(256, 1), Tiling(256, 2))
"""What there is to choose from."""


def key(op: str, dtypes: tuple[torch.dtype, torch.dtype], M: int, N: int, K: int, R: int, dropout: bool) -> str:
    """What a measured tiling is kept under: as a plan of the Triton back-end, with this one's name."""
    from lora_kernels.plans import store as tuned  # which reads a file: not before a tiling is asked for

    return f"cuda {tuned.key(op, *dtypes, M, N, K, R, dropout)}"


@functools.lru_cache(maxsize=4096)
def find(
    op: str, device: str, dtypes: tuple[torch.dtype, torch.dtype], M: int, N: int, K: int, R: int, dropout: bool
) -> Tiling:
    """What was measured to be fastest on a device, by its driver's name for it and the dtypes of x and a; else
    `BY_RULE`."""
    from lora_kernels.plans import store as tuned

    return tuned.find(device, key(op, dtypes, M, N, K, R, dropout), Tiling) or BY_RULE
