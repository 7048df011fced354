"""`Version`: one version of one adapter of a pool."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from lora_kernels.serving.source import Source, Values


class PoolFull(RuntimeError):
    """There is no room for an adapter: those in memory are leased or pinned."""


@dataclass(eq=False)
class Version:
    """One version of one adapter. Its values never change."""

    name: str
    number: int
    source: Source
    pinned: bool
    given: Values | None = None
    """The values of an adapter that has no file: on a CPU until they are laid out, beside a GPU in the host's memory as
    long as the version lives."""
    slot: int | None = None
    """Its number in the stacks of the layers; None while it is not on the device."""
    users: int = 0
    """The number of leases that hold it."""
    loading: Future[str] | None = None
    """Done when the load that is under way has ended."""
    retired: bool = False
    """Whether another version has taken its place, or it was removed."""
    fixed: bool = False
    """Whether it stays on the device as long as it is registered."""
    forgotten: bool = False
    """Whether its bytes in the host's memory are counted no longer."""

    @property
    def key(self) -> str:
        """The name and the number."""
        return f"{self.name}@{self.number}"

    @property
    def nbytes(self) -> int:
        """The bytes that it takes on the device."""
        return self.source.nbytes

    @property
    def idle(self) -> bool:
        """Whether it may leave the device."""
        return self.slot is not None and not self.users and not self.fixed


class Acquired(NamedTuple):
    """What a lease has got."""

    versions: dict[str, Version]
    """By name."""
    missing: list[Version]
    """Those that the caller has to load."""
    loads: list[Future[str]]
    """The loads that have to end before all are on the device."""
