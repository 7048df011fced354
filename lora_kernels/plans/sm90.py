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
