"""A row of the suite `kinds`: one layer at one size, computed in several ways, and what ours has to reach."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FROZEN, OURS, PEFT = "frozen", "ours", "PEFT"
"""The names of ways: the layer without an adapter, this package's, and PEFT's own forward."""


TIME, SAVED = "time", "saved"
"""What is compared: the time of a step, or the bytes that autograd keeps after a forward, without parameters."""


class Target(NamedTuple):
    """The most that our way may take, as a ratio of times or of bytes: ours / `to`."""

    to: str
    most: float
    what: str = TIME


@dataclass(frozen=True)
class Way:
    """One way to compute the layer. All ways of a cell compute the same function of the same values."""

    forward: Callable[[], Tensor]
    """Computes y from operands that require gradients."""
    trained: tuple[Tensor, ...] = ()
    """x, where its gradient is wanted, and the adapter's parameters, in the same order in every way of a cell. Those of
    the frozen layer are x alone."""
    frozen: tuple[Tensor, ...] = ()
    """The parameters of the base. Neither they nor trained Parameters count among the bytes that are saved."""
    faults: Callable[[], list[str]] | None = None
    """Returns what is wrong with y and the gradients against the equation in fp64, in words; None for the frozen
    layer."""


@dataclass(frozen=True)
class Cell:
    """One row of a table. All its ways are timed in it, interleaved."""

    kind: str
    """The table that the row stands in, such as "embedding"."""
    name: str
    """The row in words; no two rows of a table have the same. Such as "V 32000 D 2048, 512 ids, r 16"."""
    ways: Callable[[], Mapping[str, Way]]
    """Makes the operands and layers, when the cell is measured. `FROZEN` is one of them."""
    targets: tuple[Target, ...] = ()
    backward: bool = True
    """Whether the backward is timed too. Otherwise the forward runs under ``torch.no_grad()``."""
    dtype: torch.dtype = torch.float32


KINDS = ("experts", "embedding", "conv", "attention", "qdora", "folded", "vera")
"""The modules of this folder that have cells, in the order of the tables."""


def cells(kinds: Sequence[str] = KINDS) -> list[Cell]:
    """Return the cells of the named modules."""
    found = (importlib.import_module(f"lora_kernels.bench.kinds.{kind}") for kind in kinds)
    return [cell for module in found for cell in module.cells()]
