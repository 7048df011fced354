"""Calls of many adapters to a back-end, and their judge: each adapter is judged as a layer of its own over its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from support import judging
from torch import Tensor

from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.core.rows import Rows

RANKS = ((1, 0.0), (3, 0.3), (8, 0.0), (13, 0.1), (64, 0.5))
"""(R, p) of adapters that have little in common."""


@dataclass(frozen=True)
class Batch:
    """The operands of one call. ids [M] says whose each row is, -1 for nobody's."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    dy: Tensor
    adapters: list[Adapter | None]
    ids: Tensor

    @property
    def rows(self) -> Rows:
        """The rows, made anew."""
        return Rows.by_id(self.ids, len(self.adapters))

    def of(self, i: int) -> Tensor:
        """The numbers of the rows of adapter i."""
        return (self.ids == i).nonzero()[:, 0]

    def only(self, i: int) -> Batch:
        """The batch of the rows of adapter i alone."""
        own = self.of(i)
        return replace(self, x=self.x[own], dy=self.dy[own], ids=self.ids[own])

    def problem(self, i: int) -> judging.Problem:
        """Adapter i over its own rows, as a layer. Its mask is then drawn at the places of these."""
        own, adapter = self.of(i), self.adapters[i]
        assert adapter is not None
        a, b, scale, p, seed = adapter
        return judging.Problem(self.x[own], self.w, a, b, self.bias, self.dy[own], scale, p, seed)


def batch(
    M: int, N: int, K: int, adapters: Sequence[tuple[int, float] | None] = RANKS, *, ids: Tensor | None = None,
    seed: int = 0, **how: Any,
) -> Batch:  # fmt: skip
    """Return a random batch of adapters (R, p), each with a scale of its own. Every row draws its adapter from
    -1..n-1 unless `ids` says whose it is. `how` is passed to `judging.problem`."""
    q = judging.problem(M, N, K, 1, seed=seed, **how)
    made: list[Adapter | None] = []
    for i, each in enumerate(adapters):
        own = judging.problem(0, N, K, each[0], p=each[1], seed=seed + i + 1, **how) if each else None
        made.append(own.adapter._replace(scale=0.75 * (-1) ** i / (i % 3 + 1)) if own else None)
    if ids is None:
        ids = torch.randint(-1, len(made), (M,), generator=torch.Generator().manual_seed(seed))
    return Batch(q.x, q.w, q.bias, q.dy, made, ids)


@dataclass
class Results:
    """What a forward and a backward of a back-end give."""

    y: Tensor
    h: Tensor | None
    dx: Tensor | None
    da: list[Tensor | None]
    db: list[Tensor | None]


def run(backend: Any, q: Batch, needs: Needs | None = None, rows: Rows | None = None) -> Results:
    """Return the results of a back-end that is called directly, as the operators call it."""
    every = (True,) * len(q.adapters)
    needs = needs or Needs(True, every, every)
    rows = rows or q.rows
    base = Base(q.w, q.bias)
    y, h = backend.forward_multi(q.x, base, q.adapters, rows, any(needs.db))
    assert (h is not None) == any(needs.db)
    x = q.x if any(needs.da) else None
    return Results(y, h, *backend.backward_multi(q.dy, x, base, q.adapters, rows, h, needs))


def check(q: Batch, got: Results, needs: Needs | None = None) -> None:
    """Judge every result, and that there is none which was not needed. An adapter without rows has gradients of zero
    or None."""
    every = (True,) * len(q.adapters)
    needs = needs or Needs(True, every, every)
    assert (got.dx is not None) == needs.dx
    for i, (adapter, need_da, need_db) in enumerate(zip(q.adapters, needs.da, needs.db, strict=True)):
        da, db = got.da[i], got.db[i]
        if adapter is None or not len(q.of(i)):
            assert all(t is None or not t.count_nonzero() for t in (da, db))
            assert adapter is not None or (da is None and db is None)
            continue
        assert [da is not None, db is not None] == [need_da, need_db]
        dx = None if got.dx is None else got.dx[q.of(i)]
        judging.check({"y": got.y[q.of(i)], "dx": dx, "da": da, "db": db}, q.problem(i))
    theirs = [i for i, each in enumerate(q.adapters) if each is not None]
    plain = ~torch.isin(q.ids, torch.tensor(theirs, device=q.ids.device))
    assert torch.equal(got.y[plain], F.linear(q.x, q.w, q.bias)[plain])
    if got.dx is not None:
        assert torch.equal(got.dx[plain], (q.dy @ q.w)[plain])
