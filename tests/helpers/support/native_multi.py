"""Batches of rows with many adapters, for the CPU's kernels. Every adapter and its rows are drawn from a generator of
their own, so that they are the same numbers in any batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.backends import cpu, eager
from lora_kernels.core.many import AdapterStack
from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.core.rows import Rows
from lora_kernels.quant.weight import QuantizedWeight
from lora_kernels.testing.judge import Problem, judge

RANKS = (1, 3, 8, 13, 64, 256)


@dataclass
class Result:
    y: Tensor
    h: Tensor | None
    dx: Tensor | None
    da: list[Tensor | None]
    db: list[Tensor | None]


class Batch:
    """The operands of a call: row m of x belongs to adapter ids[m], or to none where that is -1. Adapters without a
    rank are None."""

    def __init__(
        self,
        ids: Tensor,
        ranks: Sequence[int | None],
        N: int = 70,
        K: int = 90,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        p: float = 0.0,
        bias: bool = True,
        stack: bool = False,
    ) -> None:
        self.ids, self.p = ids, p
        self.rows = Rows.by_id(ids, len(ranks))
        own = adapter_dtype or dtype
        self.x, self.dy = torch.empty(len(ids), K, dtype=dtype), torch.empty(len(ids), N, dtype=dtype)
        self.given: list[Adapter | None] = []
        for i in range(-1, len(ranks)):
            generator = torch.Generator().manual_seed(100 + i)
            mine = ids == i
            if i >= 0:
                self.given.append(_adapter(generator, ranks[i], N, K, own, p, i))
            self.x[mine] = torch.randn(int(mine.sum()), K, generator=generator).to(dtype)
            generator.manual_seed(500 + i)
            self.dy[mine] = torch.randn(int(mine.sum()), N, generator=generator).to(dtype)
        generator = torch.Generator().manual_seed(7)
        self.w: Any = (torch.randn(N, K, generator=generator) * K**-0.5).to(dtype)
        self.bias = torch.randn(N, generator=generator).to(dtype) if bias else None
        self.adapters: Any = AdapterStack(self.given) if stack else self.given

    def run(self, save_h: bool = True, needs: Needs | None = None, module: Any = cpu) -> Result:
        """Return the results of the back-end that is called directly, as the operators call it."""
        n = len(self.given)
        y, h = module.forward_multi(self.x, Base(self.w, self.bias), self.adapters, self.rows, save_h)
        if not save_h:
            return Result(y, h, None, [None] * n, [None] * n)
        needs = needs or Needs(True, (True,) * n, (True,) * n)
        x = self.x if any(needs.da) else None
        saved = h if any(needs.db) else None
        dx, da, db = module.backward_multi(self.dy, x, Base(self.w), self.adapters, self.rows, saved, needs)
        return Result(y, h, dx, da, db)

    def rows_of(self, i: int) -> Tensor:
        """Return the numbers of an adapter's rows."""
        return (self.ids == i).nonzero()[:, 0]

    def check(self, got: Result) -> None:
        """Assert that every adapter has the results of a layer with this adapter alone over its own rows, about as
        exact as the eager back-end's, and that rows without an adapter have the bits of the frozen layer."""
        plain = self.run(module=eager)
        for i, adapter in enumerate(self.given):
            rows = self.rows_of(i)
            if adapter is None or not len(rows):
                assert got.da[i] is None and got.db[i] is None
                continue
            part, plain_part = (
                {"da": of.da[i], "db": of.db[i], "y": of.y[rows], "dx": None if of.dx is None else of.dx[rows]}
                for of in (got, plain)
            )
            w = self.w.dequantize(torch.float32) if isinstance(self.w, QuantizedWeight) else self.w
            a, b, scale, p, seed = adapter
            q = Problem(self.x[rows], w, a, b, self.bias, self.dy[rows], scale, p, seed)
            for verdict in judge(part, q, plain=plain_part):
                assert verdict.fault is None, f"adapter {i}: {verdict.fault}"
        alone = [i for i, adapter in enumerate(self.given) if adapter is None]
        rows = torch.cat([self.rows_of(i) for i in (-1, *alone)])
        if isinstance(self.w, Tensor):
            assert torch.equal(got.y[rows], F.linear(self.x, self.w, self.bias)[rows])

    def strided(self) -> None:
        """Replace x, dy and w by views of the same numbers whose columns are contiguous."""
        self.x, self.dy, self.w = (t.t().contiguous().t() for t in (self.x, self.dy, self.w))

    def own_half(self, got: Result, i: int) -> list[Tensor]:
        """Return what belongs to an adapter: its rows of y and dx, its h, da and db."""
        rows, adapter = self.rows_of(i), self.given[i]
        assert adapter is not None and got.h is not None and got.dx is not None
        before = [(int((self.ids == j).sum()), each) for j, each in enumerate(self.given[:i])]
        first = sum(count * each.a.shape[0] for count, each in before if each is not None)
        h = got.h[first : first + len(rows) * adapter.a.shape[0]]
        return [got.y[rows], h, got.dx[rows], got.da[i], got.db[i]]  # type: ignore[list-item]


def _adapter(
    generator: torch.Generator, R: int | None, N: int, K: int, dtype: torch.dtype, p: float, i: int
) -> Adapter | None:
    if R is None:
        return None
    a = (torch.randn(R, K, generator=generator) * K**-0.5).to(dtype)
    b = (torch.randn(N, R, generator=generator) * R**-0.5).to(dtype)
    return Adapter(a, b, 0.5 + i / 8, p, torch.tensor((i << 40) + 17 * i + 5) if p else None)


def random_ids(counts: Sequence[int], seed: int = 0) -> Tensor:
    """Return ids in random order: counts[i] times i; the last count is that of rows without an adapter."""
    which = torch.arange(len(counts))
    which[-1] = -1
    ids = which.repeat_interleave(torch.tensor(counts))
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]


def without_rank(ranks: Sequence[int], i: int) -> list[int | None]:
    return [None if j == i else R for j, R in enumerate(ranks)]
