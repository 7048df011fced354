"""`Rows`: which rows of a batch belong to which adapter.

Row m of x [M, K] belongs to adapter ids[m] in 0..n-1, or to none where ids[m] is -1. A `Rows` holds that as kernels
read it: the row numbers grouped by adapter, and where each adapter's group begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BASE = -1
"""The id of a row that has no adapter."""


class Rows:
    """Which rows of x belong to which of n adapters. It is made once for each forward of a model, and serves all its
    layers.

    Adapter i owns the rows ``order[starts[i]:starts[i + 1]]``, in ascending order. The rows from ``starts[n]`` on have
    no adapter. Make one with `by_id`, `by_length` or `by_sample`.
    """

    __slots__ = ("M", "_counts", "_index", "_padded", "_repeated", "n", "order", "per_sample", "starts")

    def __init__(
        self, order: Tensor, starts: Tensor, counts: tuple[int, ...] | None = None, per_sample: bool = False
    ) -> None:
        self.order = order
        """int32 [M]: a permutation of the row numbers."""
        self.starts = starts
        """int32 [n + 1], on the device of `order`."""
        self.M = order.shape[0]
        """The number of rows, or of samples where `per_sample`."""
        self.n = starts.shape[0] - 1
        """The number of adapters."""
        self.per_sample = per_sample
        """Whether the "rows" are samples [B] of an x [B, ..., K]. A call then repeats them for the rows of each."""
        self._counts = counts
        self._index: list[slice | Tensor] | None = None
        self._repeated: tuple[int, Rows] | None = None
        self._padded: Rows | None = None

    @staticmethod
    def by_id(ids: Tensor | Sequence[int], n: int) -> Rows:
        """Return the rows of n adapters from one id per row: ids [M], integers in -1..n-1, where -1 is the base alone.

        A tensor of ids stays on its device. Its values are checked, which waits for a GPU, except while a compiler
        traces or a CUDA graph is captured.

        Raises TypeError for ids that are no integers, ValueError for another shape than [M], or an id out of range.
        """
        ids = torch.as_tensor(ids)
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            if ids.numel():
                raise TypeError(f"ids must be integers, got {ids.dtype}")
            ids = ids.long()
        if ids.dim() != 1:
            raise ValueError(f"ids must be one-dimensional, one for each row of x, got shape {tuple(ids.shape)}")
        compiling = torch.compiler.is_compiling()
        if not (compiling or (ids.is_cuda and torch.cuda.is_current_stream_capturing())) and ids.numel():
            low, high = (int(t) for t in torch.aminmax(ids))
            if low < BASE or high >= n:
                raise ValueError(
                    f"an id must lie in -1..{n - 1} (-1 is the base alone) beside {n} adapters, got {low}..{high}"
                )
        keys = torch.where(ids < 0, n, ids).to(torch.int32)
        keys, order = torch.sort(keys, stable=True)
        bounds = torch.arange(n + 1, dtype=torch.int32, device=ids.device)
        starts = torch.searchsorted(keys, bounds, out_int32=True)
        return Rows(order.to(torch.int32), starts)

    @staticmethod
    def by_length(lengths: Sequence[int], which: Sequence[int], n: int | None = None) -> Rows:
        """Return the rows of segments that follow each other in x, as packed sequences do: segment j has
        ``lengths[j]`` rows, of adapter ``which[j]``, or of none where that is -1.

        n is the number of adapters; without it, one more than the largest id. Raises ValueError where the two lists
        differ in length, for a negative length and for an id below -1 or beyond n.
        """
        lengths, which = [int(each) for each in lengths], [int(each) for each in which]
        if len(lengths) != len(which):
            raise ValueError(
                f"lengths and which must have one entry for each segment, got {len(lengths)}, {len(which)}"
            )
        if any(each < 0 for each in lengths):
            raise ValueError(f"a segment cannot have a negative number of rows, got lengths {lengths}")
        if n is None:
            n = max(which, default=BASE) + 1
        wrong = [each for each in which if not BASE <= each < n]
        if wrong:
            raise ValueError(f"an id must lie in -1..{n - 1} (-1 is the base alone) beside {n} adapters, got {wrong}")
        groups: list[list[Tensor]] = [[] for _ in range(n + 1)]
        first = 0
        for length, i in zip(lengths, which, strict=True):
            groups[i].append(torch.arange(first, first + length, dtype=torch.int32))  # -1 is the last group
            first += length
        counts = tuple(sum(len(part) for part in group) for group in groups)
        order = torch.cat([part for group in groups for part in group] or [torch.empty(0, dtype=torch.int32)])
        starts = torch.tensor([0, *counts[:n]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Rows(order, starts, counts[:n])

    @staticmethod
    def by_sample(names: Sequence[str | None], table: Mapping[str, int] | Sequence[str]) -> Rows:
        """Return the rows of a batch of samples from one adapter name per sample: all rows of ``x[j]`` belong to
        ``names[j]``. None and "__base__" are the base alone.

        `table` gives the number of each name: a mapping, or the names in the order of the adapters. Raises KeyError
        for a name that is not in the table, naming those that are.
        """
        numbers = table if isinstance(table, Mapping) else {name: i for i, name in enumerate(table)}
        unknown = sorted({str(name) for name in names if name not in numbers and name not in (None, "__base__")})
        if unknown:
            raise KeyError(f"no adapter is called {', '.join(unknown)}; there are {', '.join(numbers) or 'none'}")
        n = max(numbers.values(), default=BASE) + 1
        ids = [numbers.get(name, BASE) if name is not None else BASE for name in names]
        rows = Rows.by_id(torch.tensor(ids, dtype=torch.int64), n)
        return Rows(rows.order, rows.starts, rows.counts, per_sample=True)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of rows of each adapter, on the host. The first reading waits for a GPU."""
        if self._counts is None:
            starts = self.starts.tolist()
            self._counts = tuple(after - before for before, after in itertools.pairwise(starts))
        return self._counts

    @property
    def known_counts(self) -> tuple[int, ...] | None:
        """`counts` where asking for them waits for nothing, else None: on a GPU, and while a compiler traces."""
        if torch.compiler.is_compiling():
            return None
        return self.counts if self._counts is not None or self.starts.is_cpu else None

    def index(self, i: int) -> slice | Tensor:
        """Return the rows of adapter i as an index of x: a slice where they follow each other, else int64 numbers."""
        if self._index is None:
            order, first, found = self.order.cpu().long(), 0, []
            for count in self.counts:
                mine = order[first : first + count]
                at = int(mine[0]) if count else 0
                together = not count or int(mine[-1]) - at == count - 1
                found.append(slice(at, at + count) if together else mine.to(self.order.device))
                first += count
            self._index = found
        return self._index[i]

    def repeated(self, times: int) -> Rows:
        """Return the rows of an x [M · times, K] in which each row or sample of this one stands for `times` rows."""
        if times == 1 and not self.per_sample:
            return self
        kept = self._repeated
        if kept is not None and kept[0] == times:
            return kept[1]
        inner = torch.arange(times, dtype=torch.int32, device=self.order.device)
        order = (self.order[:, None] * times + inner).reshape(-1)
        counts = None if self._counts is None else tuple(count * times for count in self._counts)
        rows = Rows(order, self.starts * times, counts)
        if not torch.compiler.is_compiling():
            self._repeated = times, rows
        return rows

    def padded(self, n: int) -> Rows:
        """Return the same rows beside n adapters, of which those beyond the known ones have no rows."""
        if n == self.n:
            return self
        if self._padded is not None and self._padded.n == n:
            return self._padded
        more = self.starts[-1:].expand(n - self.n)
        counts = None if self._counts is None else (*self._counts, *[0] * (n - self.n))
        rows = Rows(self.order, torch.cat([self.starts, more]), counts, self.per_sample)
        if not torch.compiler.is_compiling():
            self._padded = rows
        return rows

    def to(self, device: torch.device | str) -> Rows:
        """Return the same rows with their tensors on `device`."""
        if self.order.device == torch.device(device):
            return self
        return Rows(self.order.to(device), self.starts.to(device), self._counts, self.per_sample)

    def __repr__(self) -> str:
        what = "samples" if self.per_sample else "rows"
        return f"Rows({self.M} {what}, {self.n} adapters, counts={self._counts})"
