"""The numbers of many adapters in the memory of a GPU, where the kernels of `kernels.multi` look them up."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.composite.kernels import adapters as kernels
from lora_kernels.backends.triton.device import Target, cdiv
from lora_kernels.core.dropout import rescale, threshold
from lora_kernels.core.many import AdapterStack
from lora_kernels.core.operands import Adapter, MaybeTensors

FIELDS, SHIFT = kernels.FIELDS.value, kernels.SHIFT.value
AT_ONCE = 8
"""The adapters whose numbers one launch writes."""


class Lies(NamedTuple):
    """How every a, or every b, lies in memory."""

    unit: str
    """The stride that is 1 in all: "c", that of the columns of x or dy; "r", that of the rank; "" for neither."""
    aligned: bool
    """Whether the base and the other stride are multiples of 16 bytes in all."""


class Facts(NamedTuple):
    """What the constants of the launches depend on. It is hashable."""

    n: int
    rank: int
    """The largest rank."""
    dtype: torch.dtype
    dropout: bool
    """Whether any adapter has dropout."""
    a: Lies
    b: Lies
    segments: bool = False
    """Whether the adapters are the experts of a layer, whose rows follow each other and have one mask."""


class Table(NamedTuple):
    """The adapters of a call."""

    facts: Facts
    numbers: Tensor
    """int64, the numbers of adapter i from i · FIELDS on."""


class Kept(NamedTuple):
    """What `AdapterStack.native` holds: the tables of a stack."""

    slots: tuple[Adapter | None, ...]
    """The adapters that the tables describe."""
    tables: dict[int, Table]
    """By stream: nothing orders the launch that writes a table before what another stream runs."""


def table_of(target: Target, adapters: Sequence[Adapter | None]) -> Table:
    """Return the table of the adapters of a forward, at least one of which is not None. That of a stack is kept until
    the stack is changed, except while a graph is captured, which would write it at its replay only."""
    if not isinstance(adapters, AdapterStack):
        return make(adapters)
    slots, kept = adapters.slots, adapters.native
    if not isinstance(kept, Kept) or kept.slots is not slots:
        kept = Kept(slots, {})
    stream = target.stream()
    found = kept.tables.get(stream)
    if found is None:
        found = make(slots)
        if not target.capturing():
            kept.tables[stream] = found
            adapters.native = kept
    return found


def make(adapters: Sequence[Adapter | None], das: MaybeTensors | None = None, dbs: MaybeTensors | None = None) -> Table:
    """Return a new table, with the addresses of the gradients that are wanted, written on the current stream.

    The numbers travel as arguments of launches. So nothing waits for a copy from the host's memory, and a graph that is
    being captured holds them.
    """
    known = [each for each in adapters if each is not None]
    seeds = [each.seed for each in known if each.seed is not None]
    # An adapter without dropout takes the seed of another, and a threshold of 0 keeps all of its x.
    other = seeds[0].data_ptr() if seeds else 0
    numbers: list[int] = []
    for i, each in enumerate(adapters):
        if each is None:
            numbers += [0] * FIELDS
            continue
        a, b, scale, p, seed = each
        numbers += (
            a.data_ptr(), b.data_ptr(), other if seed is None else seed.data_ptr(), _address(das, i), _address(dbs, i),
            a.shape[0], *a.stride(), *b.stride(), threshold(p), _bits(scale), _bits(rescale(p)),
        )  # fmt: skip
    facts = Facts(
        len(adapters),
        max(each.a.shape[0] for each in known),
        known[0].a.dtype,
        any(each.p > 0 for each in known),
        _lies(each.a.t() for each in known),
        _lies(each.b for each in known),
    )
    return Table(facts, _written(numbers, known[0].a.device))


def make_stack(adapter: Adapter, da: Tensor | None = None, db: Tensor | None = None) -> Table:
    """Return a new table of the experts of a layer, whose a [E, R, K] and b [E, N, R] are stacks. One launch writes it,
    whatever E is. A gradient is contiguous."""
    a, b, scale, p, seed = adapter
    E, R = a.shape[:2]
    table = torch.empty(E, FIELDS, dtype=torch.int64, device=a.device)
    numbers = (
        a.data_ptr(), b.data_ptr(), 0 if seed is None else seed.data_ptr(), 0 if da is None else da.data_ptr(),
        0 if db is None else db.data_ptr(), R, *a.stride()[1:], *b.stride()[1:], threshold(p), _bits(scale),
        _bits(rescale(p)),
    )  # fmt: skip
    steps = [_step(a), _step(b), 0, _step(da), _step(db), *[0] * (FIELDS - 5)]
    kernels.fill_stack[(E,)](table, tuple(map(code_of, numbers)), tuple(map(code_of, steps)), num_warps=1)
    # Where two of the matrices are aligned, all are.
    of_a, of_b = _lies(a[:2].transpose(1, 2).unbind()), _lies(b[:2].unbind())
    return Table(Facts(E, R, a.dtype, p > 0, of_a, of_b, True), table)


def _step(stack: Tensor | None) -> int:
    """Return the bytes from one matrix of a stack to the next."""
    return 0 if stack is None else stack.stride(0) * stack.element_size()


def code_of(number: int) -> int:
    """Return what `fill` gets for a number of 0 to 2⁵⁸. Triton compiles a kernel of its own for an entry of a tuple
    that is 1, a multiple of 16, or below 2³¹. A code is none of these."""
    return SHIFT + 2 * number + 1


def _written(numbers: list[int], device: torch.device) -> Tensor:
    count = AT_ONCE * FIELDS
    launches = cdiv(len(numbers), count)
    table = torch.empty(launches, count, dtype=torch.int64, device=device)
    codes = [*map(code_of, numbers), *[code_of(0)] * (launches * count - len(numbers))]
    for i, part in enumerate(table.unbind(0)):
        kernels.fill[(1,)](part, tuple(codes[i * count : (i + 1) * count]), num_warps=1)
    return table


def _address(gradients: MaybeTensors | None, i: int) -> int:
    gradient = gradients[i] if gradients is not None else None
    return 0 if gradient is None else gradient.data_ptr()


def _bits(number: float) -> int:
    """Return the bits of a number in fp32."""
    return int.from_bytes(bytes(ctypes.c_float(number)), sys.byteorder)


def _lies(matrices: Iterable[Tensor]) -> Lies:
    """Return how matrices [columns, R] lie in memory."""
    unit_c = unit_r = aligned_c = aligned_r = True
    for t in matrices:
        (columns, R), (c, r) = t.shape, t.stride()
        multiple = 16 // t.itemsize
        unit_c, unit_r = unit_c and (c == 1 or columns == 1), unit_r and (r == 1 or R == 1)
        base = t.data_ptr() % 16 == 0
        aligned_c = aligned_c and base and (r % multiple == 0 or R == 1)
        aligned_r = aligned_r and base and (c % multiple == 0 or columns == 1)
    if unit_c:
        return Lies("c", aligned_c)
    return Lies("r", aligned_r) if unit_r else Lies("", False)
