"""`Version`: one version of one adapter of a pool, and what is told about adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
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


class Acquired(NamedTuple):
    """What a lease has got."""

    versions: dict[str, Version]
    """By name."""
    missing: list[Version]
    """Those that the caller has to load."""
    loads: list[Future[str]]
    """The loads that have to end before all are on the device."""


@dataclass
class Counts:
    """What a pool has counted since it was made."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    rows: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Registration:
    """What `AdapterPool.register` and `update` found in an adapter."""

    key: str
    """"name@version"."""
    layers: tuple[str, ...]
    """The layers that it changes."""
    passed_over: Mapping[str, str]
    """Why another layer that it has values for is not served, for each of these."""
    missing: tuple[str, ...]
    """The layers that its config names, and that it has no values for."""
    nbytes: int
    """The bytes that it takes on the device."""

    @classmethod
    def of(cls, version: Version) -> Registration:
        """Return what is told about a version."""
        source = version.source
        return cls(version.key, tuple(source.ranks), source.passed_over, source.missing, source.nbytes)
