"""The adapters in vLLM's slots, in the layout of the kernels.

vLLM keeps the adapters of a layer in two tensors, A [slots, 1, largest rank, K] and B [slots, 1, N, largest rank]. A
slot's adapter fills its first rows of A and columns of B, and the rest is zeros. B already holds the adapter's scale.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lora_kernels.core.many import AdapterStack, stored
from lora_kernels.core.operands import Adapter


def used_rank(a: Tensor, b: Tensor) -> int:
    """Return the number of leading ranks of A [R, K] and B [N, R] after which every rank is zeros in A or in B, and so
    adds nothing."""
    used = (a != 0).any(dim=1) & (b != 0).any(dim=0)
    return int(used.nonzero().max()) + 1 if used.any() else 0


class Slots:
    """The adapters of one A and one B of vLLM, laid out when they are first used and again after vLLM has written to
    their slot.

    A write shows in the version counters of the two tensors, which count the writes to all slots, and another tensor
    in their addresses. After such a change a slot is compared with what was laid out before it is used again. So an
    adapter that is loaded into one slot costs the others a comparison, and a step without loading costs nothing.
    """

    def __init__(self, slots: int, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._stack = AdapterStack([None] * slots)
        self._sign: tuple[int, ...] | None = None
        """The versions and addresses of A and B when they were last looked at."""
        self._current: set[int] = set()
        """The slots that have been looked at since the last write."""

    def adapters(self, a: Tensor, b: Tensor, used: Iterable[int]) -> AdapterStack:
        """Return the adapters by slot. Those of `used` are what A and B hold now, and None where that adds nothing."""
        counted = not (a.is_inference() or b.is_inference())  # tensors of inference mode count no writes
        sign = (a._version, b._version, a.data_ptr(), b.data_ptr()) if counted else None
        if sign is None or sign != self._sign:
            self._current.clear()
            self._sign = sign
        changed: dict[int, Adapter | None] = {}
        for slot in used:
            if slot not in self._current:
                own_a, own_b = a[slot].flatten(0, -2), b[slot].flatten(0, -2)
                if not self._holds(slot, own_a, own_b):
                    changed[slot] = self._laid_out(own_a, own_b)
                self._current.add(slot)
        if changed:
            self._stack.replace(changed)
        return self._stack

    def _holds(self, slot: int, a: Tensor, b: Tensor) -> bool:
        """Return whether what was laid out for a slot is what A [R, K] and B [N, R] hold."""
        kept = self._stack[slot]
        if kept is None:
            return used_rank(a, b) == 0
        R = kept.a.shape[0]
        same = torch.equal(a[:R].to(self._dtype), kept.a) and torch.equal(b[:, :R].to(self._dtype), kept.b)
        return same and used_rank(a[R:], b[:, R:]) == 0

    def _laid_out(self, a: Tensor, b: Tensor) -> Adapter | None:
        """Return a copy of the used ranks of A [R, K] and B [N, R] in the layout of the kernels."""
        R = used_rank(a, b)
        return stored(a[:R].to(self._dtype), b[:, :R].to(self._dtype), 1.0) if R else None


class LayoutsOfSlots:
    """The `Slots` of every layer of a model: one for each A. They go when vLLM drops the tensor."""

    def __init__(self) -> None:
        self._of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def adapters(self, a: Tensor, b: Tensor, used: Iterable[int], dtype: torch.dtype) -> AdapterStack:
        """Return the adapters of A and B by slot, in `dtype`, as `Slots.adapters` does."""
        key = self._of.get(a)
        if key is None:
            key = self._of[a] = {}
        slots = key.get(dtype)
        if slots is None:
            slots = key[dtype] = Slots(a.shape[0], dtype)
        return slots.adapters(a, b, used)
