"""`Lease`: the adapters that a program uses for a while, each in one version."""

from __future__ import annotations

from contextvars import Token

from lora_kernels.nn.mixed import Mixable, Mixed, NamesOrIds
from lora_kernels.serving.layer import IN_FORCE
from lora_kernels.serving.residents import Residents
from lora_kernels.serving.version import Version


class Lease:
    """Adapters of an `AdapterPool` that stay on the device, in the versions that were current when the lease began,
    until `close` or the end of its ``with``. `AdapterPool.lease` makes it.

    ``lease[name]`` is the number of an adapter in the model's layers. It is another one in another lease.
    """

    __slots__ = ("_mixable", "_residents", "_token", "_versions")

    def __init__(self, residents: Residents, versions: dict[str, Version]) -> None:
        self._residents = residents
        self._versions: dict[str, Version] | None = versions
        table: dict[str, int] = {name: each.slot for name, each in versions.items()}  # type: ignore[misc]
        self._mixable = Mixable(residents.ids, table)
        self._token: Token[tuple[Mixable, ...]] | None = None

    def __getitem__(self, name: str) -> int:
        return self._mixable.table[name]

    @property
    def versions(self) -> tuple[Version, ...]:
        """What the lease holds; nothing after its end."""
        return tuple((self._versions or {}).values())

    def key(self, name: str) -> str:
        """Return "name@version" of the version that this lease holds. A cache of keys and values that it has computed
        belongs to this text."""
        return self._open()[name].key

    def mixed(self, names_or_ids: NamesOrIds) -> Mixed:
        """Return the context in which the model computes each sample, or each row, with an adapter of this lease or
        with the base alone. `names_or_ids` are those of `lora_kernels.mixed`, and ids are numbers of this lease.

        Raises what `lora_kernels.mixed` raises, and RuntimeError where the lease was closed.
        """
        self._open()
        context = Mixed(self._mixable, names_or_ids)
        counts = context.rows.known_counts
        if counts is not None:
            numbers = self._mixable.table.values()
            self._residents.table.count(numbers, [counts[i] for i in numbers])
        return context

    def close(self) -> None:
        """End the lease. Does nothing where it has ended."""
        versions, self._versions = self._versions, None
        if versions:
            self._residents.release(versions.values())

    def __enter__(self) -> Lease:
        self._open()
        self._token = IN_FORCE.set((self._mixable, *IN_FORCE.get()))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._token is not None:
                IN_FORCE.reset(self._token)
                self._token = None
        finally:
            self.close()

    def _open(self) -> dict[str, Version]:
        """Return what the lease holds. Raises RuntimeError where it was closed."""
        if self._versions is None:
            raise RuntimeError("this lease was closed: its adapters may have left the memory")
        return self._versions

    def __repr__(self) -> str:
        return f"Lease({', '.join(each.key for each in self.versions) or 'nothing'})"
