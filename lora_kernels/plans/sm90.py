"""The plans of the sm_90a kernels (csrc/cuda/sm90)."""

from __future__ import annotations

from typing import NamedTuple


class Sm90Plan(NamedTuple):
    """How one launch of the sm_90a kernels cuts y or dx into tiles."""

    columns: int
    """The columns of a tile."""
    cluster: int
    """The thread blocks of a cluster, which load w for each other."""


BY_RULE = Sm90Plan(0, 0)
"""Leaves the choice to `tiling` in csrc/cuda/sm90/schedule.h. Only this plan reaches the decode kernel, which the
launch takes where it can serve the call."""

PLANS = (Sm90Plan(128, 1), Sm90Plan(256, 1), Sm90Plan(256, 2))
"""Every plan that the kernels are compiled for."""

WITHOUT_CLUSTERS = Sm90Plan(256, 1)
CLUSTERS = "clusters"
"""The name of the class of kernels whose blocks work in pairs."""


def may_cluster(op: str, M: int, N: int, K: int, multiprocessors: int) -> bool:
    """Return whether `BY_RULE` could choose clusters: y, or dx in a backward, has at least two blocks of 128 rows, and
    as many tiles of 256 columns as the GPU has multiprocessors."""
    rows, tiles = -(-M // 128), -(-(N if op == "forward" else K) // 256)
    return rows >= 2 and rows * tiles >= multiprocessors
