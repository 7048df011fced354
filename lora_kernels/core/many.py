"""The adapters of one layer that are computed in one call: `Adapter`, as a caller gives it, and `AdapterStack`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.core import operands

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Adapter(NamedTuple):
    """One adapter of a layer, as the caller of `lora_linear_multi` gives it."""

    lora_a: Tensor
    """A [R, K]."""
    lora_b: Tensor
    """B [N, R]."""
    scale: float | Tensor
    """s, a number or a tensor of one element."""
    dropout_p: float = 0.0
    """The probability with which dropout zeroes an element of the adapter's rows of x."""
    seed: Tensor | int | None = None
    """The seed of the dropout mask. Where it is None, one is drawn from torch's generator."""
    bias: Tensor | None = None
    """[N]; s · bias is added to the adapter's rows of y, as with PEFT's ``lora_bias=True``."""


def panel_stride(cols: int, dtype: torch.dtype) -> int:
    """Return the row stride, in elements, of a stored matrix of `cols` columns: an odd number of cache lines, or else
    the rows would all map to the same few places of a CPU's L1 cache."""
    line = 64 // dtype.itemsize
    return (-(-cols // line) | 1) * line


def stored(a: Tensor, b: Tensor, scale: float) -> operands.Adapter:
    """Return a copy of an adapter in the layout that kernels read without packing: rows of A, and rows of Bᵀ."""
    with torch.inference_mode(False):  # else a later call could not compute the gradient of its x
        a, b = a.detach(), b.detach()
        (R, K), N = a.shape, b.shape[0]
        own_a = a.new_zeros(R, panel_stride(K, a.dtype))[:, :K]
        own_bt = b.new_zeros(R, panel_stride(N, b.dtype))[:, :N]
        own_a.copy_(a)
        own_bt.copy_(b.t())
        return operands.Adapter(own_a, own_bt.t(), float(scale))


class Slots:
    """One version of what an `AdapterStack` holds. All but `native` never changes."""

    __slots__ = ("adapters", "largest", "native", "version")

    def __init__(self, adapters: tuple[operands.Adapter | None, ...], version: int) -> None:
        self.adapters = adapters
        """The adapters by number."""
        known = [each for each in adapters if each is not None]
        self.largest = max(known, key=lambda each: each.a.shape[0], default=None)
        """The adapter of the largest rank, or None if there are none."""
        self.version = version
        self.native: object | None = None
        """What a back-end has derived from these adapters."""


class AdapterStack(Sequence["operands.Adapter | None"]):
    """The adapters of one layer that are served and not trained, by number. They are checked and laid out once, so that
    a call neither checks nor packs them.

    A number may be without an adapter: its rows get the base alone. What a stack holds is replaced as a whole and never
    written to. A call takes one `snapshot` at its start, so `replace` in another thread does not change what it reads.
    """

    def __init__(self, adapters: Iterable[Adapter | operands.Adapter | None]) -> None:
        """Copy `adapters` into the layout of the kernels. Raises ValueError or TypeError where they do not belong to
        one layer, or one of them has dropout, a bias of its own, or a scale that is no finite number."""
        self._now = Slots((), 0)
        given = tuple(adapters)
        self.replace({i: _laid_out(i, each) for i, each in enumerate(given)}, len(given))

    def replace(self, changed: Mapping[int, operands.Adapter | None], size: int | None = None) -> None:
        """Put the adapters `changed`, as `stored` makes them, in their places, all at once; `size` adds places at the
        end. Threads that replace at the same time must take turns.

        Raises ValueError or TypeError where an adapter does not belong to the layer of the others, and IndexError for a
        place that there is not. The stack is then as it was.
        """
        before = self._now
        slots = list(before.adapters)
        if size is not None:
            if size < len(slots):
                raise ValueError(f"a stack of {len(slots)} places cannot shrink to {size}: replace adapters by None")
            slots += [None] * (size - len(slots))
        for i, adapter in changed.items():
            if not 0 <= i < len(slots):
                raise IndexError(f"the stack has the places 0..{len(slots) - 1}, got {i}: pass size to add places")
            if adapter is not None and not isinstance(adapter, operands.Adapter):
                raise TypeError(f"place {i} must get what `stored` makes, or None, got a {type(adapter).__name__}")
            slots[i] = adapter
        kept = next((each for i, each in enumerate(slots) if each is not None and i not in changed), None)
        facts = {_facts(each) for each in (kept, *changed.values()) if each is not None}
        if len(facts) > 1:
            every = "; ".join(sorted(", ".join(map(str, each)) for each in facts))
            raise ValueError(f"the adapters of a stack must share K, N, dtype and device, got {every}")
        self._now = Slots(tuple(slots), before.version + 1)

    def snapshot(self) -> AdapterStack:
        """Return a stack that holds the same adapters, and keeps them when this one's are replaced. It shares
        `native` with this version of the stack."""
        same = AdapterStack.__new__(AdapterStack)
        same._now = self._now
        return same

    @property
    def version(self) -> int:
        """A number that grows whenever an adapter is replaced: what is derived from the stack is stale then."""
        return self._now.version

    @property
    def native(self) -> object | None:
        """What a back-end keeps for this version of the stack; None after `replace`. A back-end sets it on the stack
        that it was given, which is a snapshot."""
        return self._now.native

    @native.setter
    def native(self, derived: object | None) -> None:
        self._now.native = derived

    @property
    def largest(self) -> operands.Adapter | None:
        """The adapter of the largest rank. It stands for all in questions of sizes, dtypes and devices."""
        return self._now.largest

    @property
    def facts(self) -> tuple[int, int, torch.dtype, torch.device] | None:
        """(K, N, dtype, device) of the adapters; None where there are none."""
        largest = self._now.largest
        return None if largest is None else _facts(largest)

    @property
    def slots(self) -> tuple[operands.Adapter | None, ...]:
        """The adapters by number. The tuple does not change; `replace` makes another one."""
        return self._now.adapters

    def __getitem__(self, i):  # type: ignore[no-untyped-def,override]
        return self._now.adapters[i]

    def __len__(self) -> int:
        return len(self._now.adapters)

    def __iter__(self) -> Iterator[operands.Adapter | None]:
        return iter(self._now.adapters)

    def __repr__(self) -> str:
        ranks = [each.a.shape[0] for each in self._now.adapters if each is not None]
        return f"AdapterStack({len(self)} places, {len(ranks)} adapters, ranks {ranks})"


def _facts(adapter: operands.Adapter) -> tuple[int, int, torch.dtype, torch.device]:
    """Return what the adapters of a stack must share: K, N, dtype and device."""
    a, b = adapter.a, adapter.b
    if a.dtype != b.dtype:
        raise TypeError(f"an adapter must have A and B in one dtype, got {a.dtype} and {b.dtype}")
    return a.shape[1], b.shape[0], a.dtype, a.device


def _laid_out(i: int, given: Adapter | operands.Adapter | None) -> operands.Adapter | None:
    """Return `given` in the layout of the kernels."""
    if given is None:
        return None
    if not isinstance(given, (Adapter, operands.Adapter)):
        raise TypeError(f"adapter {i} must be a lora_kernels.Adapter or None, got a {type(given).__name__}")
    a, b, scale, p = given[:4]
    bias = given.bias if isinstance(given, Adapter) else None
    if p or bias is not None:
        what = f"dropout, p = {p}" if p else "a bias of its own"
        raise ValueError(f"an AdapterStack is for serving, and adapter {i} has {what}: pass a list of adapters instead")
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ValueError(f"adapter {i} must have A [R, K] and B [N, R], got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype or a.dtype not in _DTYPES:
        raise TypeError(f"adapter {i} must have A and B in one floating dtype, got {a.dtype} and {b.dtype}")
    number = float(scale)
    if not abs(number) < float("inf"):
        raise ValueError(f"the scale of adapter {i} must be finite, got {number}")
    return stored(a, b, number)
