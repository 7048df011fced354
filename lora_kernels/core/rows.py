"""`Rows`: which rows of a batch belong to which adapter.

Row m of x [M, K] belongs to adapter ids[m] in 0..n-1, or to none where ids[m] is -1. A `Rows` holds that as kernels
read it: the row numbers grouped by adapter, and where each adapter's group begins.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

BASE = -1
"""The id of a row that has no adapter."""

BASE_NAMES = (None, "__base__")
"""The names of the base alone. PEFT uses the second."""

_NO_ROWS = slice(0, 0)

_KEPT = 8
"""How many results of one kind a `Rows` keeps. A model has few lengths: those of its layers, and of an encoder's."""


class Rows:
    """Which rows of x belong to which of n adapters. It is made once for each forward of a model, and serves all its
    layers.

    Adapter i owns the rows ``order[starts[i]:starts[i + 1]]``, in ascending order. The rows from ``starts[n]`` on have
    no adapter. Make one with `by_id`, `by_length` or `by_sample`. A `Rows` never changes: what its methods derive from
    it is kept with it, and several threads may share it.
    """

    __slots__ = (
        "M",
        "_counts",
        "_in_order",
        "_index",
        "_moved",
        "_padded",
        "_repeated",
        "_used",
        "n",
        "order",
        "per_sample",
        "starts",
    )

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
        self._used: tuple[int, ...] | None = None
        self._in_order: bool | None = None
        self._index: dict[int, slice | Tensor] | None = None
        self._repeated: dict[int, Rows] = {}
        self._padded: dict[int, Rows] = {}
        self._moved: dict[torch.device, Rows] = {}

    @staticmethod
    def by_id(ids: Tensor | Sequence[int], n: int) -> Rows:
        """Return the rows of n adapters from one id per row: ids [M], integers in -1..n-1, where -1 is the base alone.

        A tensor of ids stays on its device. Its values are checked and counted, which waits for a GPU once, except
        while the call is recorded by a compiler or captured into a CUDA graph.

        Raises TypeError for ids that are no integers, ValueError for another shape than [M], or an id out of range.
        """
        if not isinstance(ids, Tensor):
            ids = torch.tensor(ids, device="cpu")  # whatever the default device is
        if ids.dim() != 1:
            raise ValueError(f"ids must be one-dimensional, one for each row of x, got shape {tuple(ids.shape)}")
        no_integers = ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool
        if no_integers and ids.shape[0]:  # torch makes an empty list a float tensor
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        ids = ids.long()  # n need not fit into the dtype of the ids
        keys, order = torch.sort(torch.where(ids < 0, n, ids).to(torch.int32), stable=True)
        bounds = torch.arange(n + 1, dtype=torch.int32, device=ids.device)
        rows = Rows(order.to(torch.int32), torch.searchsorted(keys, bounds, out_int32=True))
        if _recorded(ids):
            return rows
        if not ids.shape[0]:
            rows._counts = (0,) * n
            return rows
        low, high, *starts = _values(torch.cat([torch.stack(torch.aminmax(ids)), rows.starts]))  # waits for a GPU once
        if low < BASE or high >= n:
            raise ValueError(f"{_allowed(n)}, got {low}..{high}")
        rows._counts = _differences(starts)
        return rows

    @staticmethod
    def by_length(lengths: Sequence[int], which: Sequence[int], n: int | None = None) -> Rows:
        """Return the rows of segments that follow each other in x, as packed sequences do: segment j has
        ``lengths[j]`` rows, of adapter ``which[j]``, or of none where that is -1.

        n is the number of adapters; without it, one more than the largest id. Raises TypeError for what is no integer,
        ValueError where the two lists differ in length, for a negative length and for an id below -1 or beyond n.
        """
        lengths, which = list(map(operator.index, lengths)), list(map(operator.index, which))
        if len(lengths) != len(which):
            raise ValueError(
                f"lengths and which must have one entry for each segment, got {len(lengths)}, {len(which)}"
            )
        if any(each < 0 for each in lengths):
            raise ValueError(f"a segment cannot have a negative number of rows, got lengths {lengths}")
        if n is None:
            n = max([BASE, *which]) + 1
        wrong = [each for each in which if not BASE <= each < n]
        if wrong:
            raise ValueError(f"{_allowed(n)}, got {wrong}")
        groups: list[list[Tensor]] = [[] for _ in range(n + 1)]
        first = 0
        for length, i in zip(lengths, which, strict=True):
            rows = torch.arange(first, first + length, dtype=torch.int32, device="cpu")
            groups[i].append(rows)  # those of -1 are the last group
            first += length
        counts = tuple(sum(len(part) for part in group) for group in groups)
        order = torch.cat(
            [part for group in groups for part in group] or [torch.empty(0, dtype=torch.int32, device="cpu")]
        )
        starts = torch.tensor([0, *counts[:n]], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        return Rows(order, starts, counts[:n])

    @staticmethod
    def by_sample(names: Sequence[str | None], table: Mapping[str, int] | Sequence[str]) -> Rows:
        """Return the rows of a batch of samples from one adapter name per sample: all rows of ``x[j]`` belong to
        ``names[j]``. None and "__base__" are the base alone.

        `table` gives the number of each name: a mapping, or the names in the order of the adapters. Raises KeyError
        for a name that is not in the table, naming those that are.
        """
        for what, given in (("names", names), ("table", table)):
            if isinstance(given, str):
                raise TypeError(f"{what} must be a list of names, got the name {given!r}: write [{given!r}]")
        numbers = table if isinstance(table, Mapping) else {name: i for i, name in enumerate(table)}
        if len(numbers) < len(table):
            raise ValueError(f"the names in the table must differ, got {list(table)}")
        unknown = sorted({str(name) for name in names if name not in numbers and name not in BASE_NAMES})
        if unknown:
            raise KeyError(f"no adapter is called {', '.join(unknown)}; there are {', '.join(numbers) or 'none'}")
        n = max([BASE, *numbers.values()]) + 1
        ids = [BASE if name is None else numbers.get(name, BASE) for name in names]
        rows = Rows.by_id(torch.tensor(ids, dtype=torch.int64, device="cpu"), n)
        return Rows(rows.order, rows.starts, rows.known_counts, per_sample=True)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of rows of each adapter, on the host. The first reading waits for a GPU, if the rows were made
        while the call was recorded."""
        if self._counts is None:
            self._counts = _differences(_values(self.starts))
        return self._counts

    @property
    def known_counts(self) -> tuple[int, ...] | None:
        """`counts` where asking for them waits for nothing, else None: on a GPU, and while a call is recorded."""
        if _traced():
            return None
        return self.counts if self._counts is not None or self.starts.is_cpu else None

    @property
    def used(self) -> tuple[int, ...]:
        """The adapters that have rows, in ascending order, on the host. The first reading waits for a GPU."""
        if self._used is None:
            self._used = tuple(i for i, count in enumerate(self.counts) if count)
        return self._used

    @property
    def is_in_order(self) -> bool:
        """Whether the rows of each adapter follow each other in the order of the adapters, and the rest comes last:
        `order` is then 0, 1, 2 and so on. The first reading waits for a GPU, unless `in_order` has made the rows."""
        if self._in_order is None:
            self._in_order = torch.equal(self.order, _numbers(self.order))
        return self._in_order

    @property
    def known_in_order(self) -> bool | None:
        """`is_in_order` where it is known, or can be found out at once; else None: on a GPU, while a call is recorded,
        and under a mode that sees every operator."""
        unread = _traced() or not self.order.is_cpu or torch._C._len_torch_dispatch_stack() > 0
        return None if unread and self._in_order is None else self.is_in_order

    def in_order(self) -> Rows:
        """Return the rows of ``x[order]``, in which those of each adapter follow each other."""
        rows = Rows(_numbers(self.order), self.starts, self._counts, self.per_sample)
        rows._in_order = True
        return rows

    def spans(self) -> list[tuple[int, int, int]]:
        """Return (adapter, first, last + 1) for each adapter that has rows: where these stand in `order`. The first
        reading waits for a GPU."""
        counts, first, spans = self.counts, 0, []
        for i in self.used:
            spans.append((i, first, first + counts[i]))
            first += counts[i]
        return spans

    def ids(self) -> Tensor:
        """Return the adapter of each row, int64 [M] on the device of `order`: what `by_id` takes. No value is read on
        the host."""
        places = torch.arange(self.order.shape[0], dtype=torch.int32, device=self.order.device)
        ids = torch.searchsorted(self.starts[1:], places, right=True)
        ids = torch.where(ids < self.n, ids, BASE)
        return torch.empty_like(ids).scatter_(0, self.order.long(), ids)

    def places(self) -> Tensor:
        """Return the place of each row among the rows of its adapter, or among those without one: int64 [M]. The
        dropout mask of a row is drawn at its place."""
        order, starts = self.order.long(), self.starts.long()
        places = torch.arange(order.shape[0], device=order.device)
        places -= starts[torch.searchsorted(starts[1:], places, right=True)]
        return torch.empty_like(places).scatter_(0, order, places)

    def index(self, i: int) -> slice | Tensor:
        """Return the rows of adapter i as an index of x: a slice where they follow each other, else int64 numbers."""
        kept = self._index
        if kept is None:
            kept = self._index = self._indices()
        return kept.get(i, _NO_ROWS)

    def _indices(self) -> dict[int, slice | Tensor]:
        """Return `index` of every adapter that has rows."""
        counts, used, first = self.counts, self.used, 0
        if not used:
            return {}
        ends = []
        for i in used:
            ends += [first, first + counts[i] - 1]
            first += counts[i]
        at = _values(self.order[torch.tensor(ends, device=self.order.device)])
        order, found = self.order.long(), dict[int, slice | Tensor]()
        for j, i in enumerate(used):
            first, last = at[2 * j : 2 * j + 2]
            together = last - first == counts[i] - 1  # the rows of an adapter ascend
            found[i] = slice(first, last + 1) if together else order[ends[2 * j] : ends[2 * j + 1] + 1]
        return found

    def repeated(self, times: int) -> Rows:
        """Return the rows of an x [M · times, K] in which each row or sample of this one stands for `times` rows."""
        if times == 1 and not self.per_sample:
            return self
        if _recorded(self.order):
            return self._repeat(times)
        return _kept(self._repeated, times, self._repeat)

    def _repeat(self, times: int) -> Rows:
        inner = torch.arange(times, dtype=torch.int32, device=self.order.device)
        order = (self.order[:, None] * times + inner).reshape(-1)
        counts = self.known_counts
        return Rows(order, self.starts * times, counts and tuple(count * times for count in counts))

    def padded(self, n: int) -> Rows:
        """Return the same rows beside n adapters, of which those beyond the known ones have no rows. Raises ValueError
        where n is less than the number of adapters that are known."""
        if n == self.n:
            return self
        if n < self.n:
            raise ValueError(f"rows names {self.n} adapters, and {n} were given")
        if _recorded(self.order):
            return self._pad(n)
        return _kept(self._padded, n, self._pad)

    def _pad(self, n: int) -> Rows:
        more = self.starts[-1:].expand(n - self.n)
        counts = self.known_counts
        counts = None if counts is None else (*counts, *[0] * (n - self.n))
        rows = Rows(self.order, torch.cat([self.starts, more]), counts, self.per_sample)
        rows._in_order = self._in_order
        return rows

    def to(self, device: torch.device | str) -> Rows:
        """Return the same rows with their tensors on `device`."""
        device = torch.device(device)
        if self.order.device == device:
            return self
        if _recorded(self.order):
            return self._move(device)
        return _kept(self._moved, device, self._move)

    def _move(self, device: torch.device) -> Rows:
        rows = Rows(self.order.to(device), self.starts.to(device), self.known_counts, self.per_sample)
        rows._in_order = self._in_order
        return rows

    def __repr__(self) -> str:
        what = "samples" if self.per_sample else "rows"
        return f"Rows({self.M} {what}, {self.n} adapters, counts={self._counts})"


def _values(t: Tensor) -> list[int]:
    """Return ``t.tolist()``, also within a gradient of torch.func, where torch 2.6 reads no list out of any tensor."""
    if not torch._C._are_functorch_transforms_active():
        return t.tolist()  # type: ignore[no-any-return]
    while torch._C._functorch.is_gradtrackingtensor(t):  # type: ignore[attr-defined]
        t = torch._C._functorch.get_unwrapped(t)  # type: ignore[attr-defined]
    if torch._C._functorch.is_functorch_wrapped_tensor(t):  # type: ignore[attr-defined]
        return t.tolist()  # type: ignore[no-any-return]  # of vmap, which raises
    with torch._C._DisableFuncTorch():  # type: ignore[attr-defined]
        return t.tolist()  # type: ignore[no-any-return]


def _numbers(order: Tensor) -> Tensor:
    """Return the numbers 0, 1, 2 and so on, as many as `order` has, in its dtype and on its device."""
    return torch.arange(order.shape[0], dtype=order.dtype, device=order.device)


def _traced() -> bool:
    """Return whether a compiler or torch.jit.trace records what is done. Values are then not known."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def _recorded(t: Tensor) -> bool:
    """Return whether what is done with t is recorded, or captured into a CUDA graph. Values must then not be read, and
    nothing that is derived may be kept: it belongs to the record, or lies in the memory of the graph."""
    return _traced() or (t.is_cuda and torch.cuda.is_current_stream_capturing())


def _allowed(n: int) -> str:
    """Return the beginning of an error about an id."""
    return f"an id must lie in {BASE}..{n - 1} ({BASE} is the base alone) beside {n} adapters"


def _differences(starts: list[int]) -> tuple[int, ...]:
    """Return the number of rows of each adapter from where each begins."""
    return tuple([after - before for before, after in itertools.pairwise(starts)])


def _kept(results: dict[T, Rows], key: T, make: Callable[[T], Rows]) -> Rows:
    """Return ``make(key)``, which `results` keeps. Two threads may both make it; either result is right."""
    found = results.get(key)
    if found is None:
        if len(results) >= _KEPT:
            results.clear()
        with torch.inference_mode(False):  # autograd cannot save a tensor of inference mode later
            found = results[key] = make(key)
    return found
