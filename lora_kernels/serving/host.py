"""`HostTier`: copies of adapters in the host's memory, for a pool whose device has memory of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from lora_kernels.serving.source import Values


class HostTier:
    """Copies of the adapters that were read most recently, up to a number of bytes. Its caller holds the pool's
    lock."""

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.used = 0
        """The bytes of the copies, and of what `reserve` has counted."""
        self._kept: OrderedDict[Hashable, Values] = OrderedDict()

    def get(self, key: Hashable) -> Values | None:
        """Return the copies of an adapter, or None."""
        values = self._kept.get(key)
        if values is not None:
            self._kept.move_to_end(key)
        return values

    def put(self, key: Hashable, values: Values) -> None:
        """Keep the copies of an adapter, in the place of those that were used the longest time ago. Keep nothing where
        there is no room."""
        if key not in self._kept and self.reserve(nbytes_of(values)):
            self._kept[key] = values

    def reserve(self, nbytes: int) -> bool:
        """Count so many bytes as used, and drop copies that were not used for the longest time to make room. Return
        False, and drop nothing, where that is not enough."""
        if self.budget is not None:
            kept = sum(map(nbytes_of, self._kept.values()))
            if self.used - kept + nbytes > self.budget:
                return False
            while self.used + nbytes > self.budget:
                self.drop(next(iter(self._kept)))
        self.used += nbytes
        return True

    def drop(self, key: Hashable) -> None:
        """Keep the copies of an adapter no longer."""
        values = self._kept.pop(key, None)
        if values is not None:
            self.used -= nbytes_of(values)


def nbytes_of(values: Values) -> int:
    """Return the bytes of A and B in all layers."""
    return sum(a.nbytes + b.nbytes for a, b in values.values())
