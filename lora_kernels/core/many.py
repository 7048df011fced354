"""The adapters of one layer that are computed in one call: `Adapter`, as a caller gives it, and `AdapterStack`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.core import operands


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
    a, b = a.detach(), b.detach()
    (R, K), N = a.shape, b.shape[0]
    own_a = a.new_zeros(R, panel_stride(K, a.dtype))[:, :K]
    own_bt = b.new_zeros(R, panel_stride(N, b.dtype))[:, :N]
    own_a.copy_(a)
    own_bt.copy_(b.t())
    return operands.Adapter(own_a, own_bt.t(), float(scale))


class AdapterStack(Sequence["operands.Adapter | None"]):
    """The adapters of one layer that are served and not trained, by number. They are checked and laid out once, so that
    a call neither checks nor packs them.

    A number may be without an adapter: its rows get the base alone. What a stack holds is replaced as a whole and never
    written to, so a call that is under way keeps what it has read.
    """

    def __init__(self, adapters: Iterable[Adapter | operands.Adapter | None]) -> None:
        """Copy `adapters` into the layout of the kernels. Raises ValueError or TypeError where they do not belong to
        one layer, or one of them has dropout, a bias of its own, or a scale that is no finite number."""
        self._slots: tuple[operands.Adapter | None, ...] = ()
        self.version = 0
        """A number that grows whenever an adapter is replaced: what is derived from the stack is stale then."""
        self.native: object | None = None
        """What a back-end keeps for this version of the stack; `replace` sets it to None."""
        given = tuple(adapters)
        self.replace({i: _laid_out(i, each) for i, each in enumerate(given)}, len(given))

    def replace(self, changed: dict[int, operands.Adapter | None], size: int | None = None) -> None:
        """Put the adapters `changed`, as `stored` makes them, in their places, all at once; `size` adds places at the
        end. Raises ValueError or TypeError where an adapter does not belong to the layer of the others."""
        slots = list(self._slots) + [None] * ((size or len(self._slots)) - len(self._slots))
        for i, adapter in changed.items():
            slots[i] = adapter
        known = [each for each in slots if each is not None]
        facts = {(each.a.shape[1], each.b.shape[0], each.a.dtype, each.b.dtype, each.a.device) for each in known}
        if len(facts) > 1:
            raise ValueError(
                f"the adapters of a stack must share K, N, dtype and device, got {sorted(map(str, facts))}"
            )
        self._slots = tuple(slots)
        self.version += 1
        self.native = None

    @property
    def facts(self) -> tuple[int, int, torch.dtype, torch.device] | None:
        """(K, N, dtype, device) of the adapters; None where there are none."""
        for each in self._slots:
            if each is not None:
                return each.a.shape[1], each.b.shape[0], each.a.dtype, each.a.device
        return None

    @property
    def slots(self) -> tuple[operands.Adapter | None, ...]:
        """The adapters by number. The tuple does not change; `replace` makes another one."""
        return self._slots

    def __getitem__(self, i):  # type: ignore[no-untyped-def,override]
        return self._slots[i]

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[operands.Adapter | None]:
        return iter(self._slots)

    def __repr__(self) -> str:
        ranks = [0 if each is None else each.a.shape[0] for each in self._slots]
        return f"AdapterStack({len(ranks)} places, ranks {ranks})"


def _laid_out(i: int, given: Adapter | operands.Adapter | None) -> operands.Adapter | None:
    """Return `given` in the layout of the kernels."""
    if given is None:
        return None
    if not isinstance(given, (Adapter, operands.Adapter)):
        raise TypeError(f"adapter {i} must be a lora_kernels.Adapter or None, got {type(given).__name__}")
    a, b, scale, p = given[:4]
    bias = given.bias if isinstance(given, Adapter) else None
    if p or bias is not None:
        what = "dropout" if p else "a bias of its own"
        raise ValueError(f"an AdapterStack is for serving, and adapter {i} has {what}: pass a list of adapters instead")
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise ValueError(f"adapter {i} must have A [R, K] and B [N, R], got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype:
        raise TypeError(f"adapter {i} must have A and B in one dtype, got {a.dtype} and {b.dtype}")
    number = float(scale)
    if not abs(number) < float("inf"):
        raise ValueError(f"the scale of adapter {i} must be finite, got {number}")
    return stored(a, b, number)
