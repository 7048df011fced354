"""What the suite `many` measures: the cells of its tables, their targets, and the operands of a cell."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.testing.judge import Problem
from lora_kernels.testing.names import SHORT

DECODE, TRAINING, BASE_ONLY = "decode", "training", "base only"
"""The kinds of cells: a forward without gradients, whose rows come in random order; a forward + backward, in which the
rows of an adapter follow each other; and a forward in which no row has an adapter."""

FROZEN, OURS, PEFT, SWITCHED = "F.linear", "lora_linear_multi", "PEFT", "PEFT switched"
LOOP, FLOOR, OWN, ONE = "looped", "addmm_", "our base", "single"
"""The names of the methods: see methods.py."""

RANKS = (8, 16, 32, 64)
"""The ranks that the adapters have in turn. A single adapter has the second of them."""
WIDTH = 2048
DTYPES = (torch.float32, torch.bfloat16)


class Target(NamedTuple):
    """The most that our method may take in a cell."""

    to: str
    """The method that ours is held against."""
    most: float
    over: bool = False
    """False: `most` is a ratio of times, ours / `to`. True: it is (ours - `to`) / F.linear, what ours takes beyond
    `to`."""


_OF_DECODE: dict[tuple[int, int], Target] = {
    **{(8, n): Target(OWN, most, over=True) for n, most in ((1, 0.06), (4, 0.12), (8, 0.17))},
    **{(32, n): Target(FROZEN, most) for n, most in ((1, 1.06), (4, 1.12), (8, 1.15), (32, 1.50))},
    **{(64, n): Target(FROZEN, most) for n, most in ((1, 1.05), (4, 1.09), (8, 1.11), (32, 1.38))},
}
"""By rows and adapters, in fp32."""

_OF_TRAINING: dict[tuple[int, int, float], Target] = {
    (n, each, p): Target(FROZEN, most)
    for n, each, without, with_dropout in (
        (4, 512, 1.08, 1.10),
        (4, 64, 1.12, 1.13),
        (8, 32, 1.15, 1.17),
        (32, 16, 1.20, 1.23),
    )
    for p, most in ((0.0, without), (0.1, with_dropout))
}
"""By adapters, rows of each, and p, in fp32."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table. All methods are timed in it, interleaved."""

    kind: str
    M: int
    n: int
    """The number of adapters. Each has M / n rows, except in `BASE_ONLY`."""
    dtype: torch.dtype = torch.float32
    p: float = 0.0
    width: int = WIDTH
    """K and N."""

    @property
    def name(self) -> str:
        """The cell in words; no two cells of a run have the same."""
        rows = f"{self.n}×{self.M // self.n}" if self.kind == TRAINING else f"{self.M} rows, {self.n} adapters"
        dropout = f" p={self.p:g}" if self.kind == TRAINING else ""
        return f"{self.kind} {SHORT[self.dtype]}: {rows}{dropout}"

    @property
    def training(self) -> bool:
        """Whether the cell is a forward + backward."""
        return self.kind == TRAINING

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each adapter."""
        return (RANKS[1],) if self.n == 1 else tuple(RANKS[i % len(RANKS)] for i in range(self.n))

    @property
    def targets(self) -> list[Target]:
        """What our method has to reach. Those beside F.linear and beside our base product are for fp32."""
        if self.kind == BASE_ONLY:
            return [Target(FROZEN, 1.01)]
        found: list[Target | None] = []
        if self.dtype == torch.float32 and self.training:
            found.append(_OF_TRAINING.get((self.n, self.M // self.n, self.p)))
        elif self.dtype == torch.float32:
            found.append(_OF_DECODE.get((self.M, self.n)))
        if self.n == 1:
            found.append(Target(ONE, 1.02))
        found += [Target(PEFT, 0.90), Target(FLOOR, 1.00)]
        return [target for target in found if target is not None]

    def entry(self) -> dict[str, Any]:
        """Return the facts about the cell, for the document."""
        facts = {"kind": self.kind, "M": self.M, "n": self.n, "dtype": SHORT[self.dtype], "p": self.p}
        return facts | {"width": self.width, "ranks": self.ranks}


def cells() -> list[Cell]:
    """Return every cell of the suite."""
    found = []
    for dtype in DTYPES:
        sizes = [(M, n) for M in (8, 32, 64) for n in (1, 4, 8, 32) if n <= M]
        found += [Cell(DECODE, M, n, dtype) for M, n in sizes]
        found += [Cell(BASE_ONLY, M, 8, dtype) for M in (8, 32, 64)]
        sizes = [(1, 512), (4, 512), (4, 64), (8, 32), (32, 16)]
        found += [Cell(TRAINING, n * each, n, dtype, p) for n, each in sizes for p in (0.0, 0.1)]
    return found


@dataclass(frozen=True)
class Batch:
    """The operands of a cell: x [M, K], w [N, K], dy [M, N], and A [R, K] and B [N, R] of each adapter."""

    cell: Cell
    x: Tensor
    w: Tensor
    dy: Tensor
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    scales: tuple[float, ...]
    ids: Tensor
    """int64 [M]: the adapter of each row, or -1."""
    seeds: tuple[Tensor | None, ...]
    """The seed of each adapter's dropout mask. None: the method draws one in each call, as in training."""

    @functools.cached_property
    def numbers(self) -> tuple[Tensor, ...]:
        """The rows of each adapter, in ascending order."""
        return tuple((self.ids == i).nonzero()[:, 0] for i in range(self.cell.n))

    @functools.cached_property
    def parts(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """A copy of each adapter's rows of x and dy, for methods that take one adapter at a time."""
        return tuple((self.x[mine], self.dy[mine]) for mine in self.numbers)

    def problem(self, i: int) -> Problem:
        """Return what adapter i computes, alone: the equation over its own rows."""
        x, dy = self.parts[i]
        seed = self.seeds[i]
        return Problem(x, self.w, self.a[i], self.b[i], None, dy, self.scales[i], self.cell.p, seed)


def batch(cell: Cell) -> Batch:
    """Return random operands of a cell. They are scaled such that every term of y has about the same size."""
    generator = torch.Generator().manual_seed(0)
    width, dtype = cell.width, cell.dtype

    def draw(rows: int, cols: int, std: float) -> Tensor:
        return (torch.randn(rows, cols, generator=generator) * std).to(dtype)

    if cell.kind == BASE_ONLY:
        ids = torch.full((cell.M,), -1)
    else:
        ids = torch.arange(cell.n).repeat_interleave(cell.M // cell.n)
        if not cell.training:
            ids = ids[torch.randperm(cell.M, generator=generator)]
    return Batch(
        cell,
        x=draw(cell.M, width, 1.0),
        w=draw(width, width, width**-0.5),
        dy=draw(cell.M, width, 1.0),
        a=tuple(draw(R, width, width**-0.5) for R in cell.ranks),
        b=tuple(draw(width, R, R**-0.5) for R in cell.ranks),
        scales=tuple(0.5 + i % 3 / 4 for i in range(cell.n)),
        ids=ids,
        seeds=tuple(torch.tensor(1000 + i) if cell.p else None for i in range(cell.n)),
    )
