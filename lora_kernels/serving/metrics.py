"""What an `AdapterPool` has counted, as numbers and in the text format that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class PoolStats:
    """The numbers of a pool at one moment."""

    registered: int
    """Adapters that can be leased."""
    resident: int
    """Versions on the device."""
    leased: int
    """Versions that leases hold."""
    waiting: int
    """Leases that wait for room."""
    hits: int
    """Adapters that were on the device when a lease asked for them."""
    misses: int
    """Adapters that had to be loaded for a lease."""
    loads: int
    """Loads onto the device."""
    load_seconds: float
    """The time that they took, all together."""
    evictions: int
    """Adapters that have left the device to make room for another."""
    device_bytes: int
    """The bytes of adapters on the device. On a CPU that is the memory."""
    host_bytes: int
    """The bytes of copies in the host's memory; 0 on a CPU."""
    disk_bytes: int
    """The bytes of the registered files."""
    rows: dict[str, int]
    """The rows or samples that were given to each adapter in contexts of leases, by its name."""


_METRICS = (
    ("registered", "adapters_registered", "gauge", "Adapters that can be leased."),
    ("resident", "adapters_resident", "gauge", "Adapter versions on the device."),
    ("leased", "adapters_leased", "gauge", "Adapter versions that leases hold."),
    ("waiting", "leases_waiting", "gauge", "Leases that wait for room on the device."),
    ("hits", "hits_total", "counter", "Leased adapters that were on the device."),
    ("misses", "misses_total", "counter", "Leased adapters that had to be loaded."),
    ("loads", "loads_total", "counter", "Loads onto the device."),
    ("load_seconds", "load_seconds_total", "counter", "Seconds that loads took."),
    ("evictions", "evictions_total", "counter", "Adapters evicted from the device."),
)
"""(field, name after the prefix, type, help)."""
_TIERS = ("device", "host", "disk")
_PREFIX = "lora_pool_"


def prometheus(stats: PoolStats) -> str:
    """Return the numbers in Prometheus' text format, version 0.0.4."""
    return "\n".join([*_lines(stats), ""])


def _lines(stats: PoolStats) -> Iterator[str]:
    for field, name, kind, text in _METRICS:
        yield from _head(name, kind, text)
        yield f"{_PREFIX}{name} {getattr(stats, field)}"
    yield from _head("bytes", "gauge", "Bytes of adapters in each tier.")
    for tier in _TIERS:
        yield f'{_PREFIX}bytes{{tier="{tier}"}} {getattr(stats, f"{tier}_bytes")}'
    yield from _head("rows_total", "counter", "Rows or samples computed with an adapter.")
    for adapter, rows in sorted(stats.rows.items()):
        yield f'{_PREFIX}rows_total{{adapter="{_escaped(adapter)}"}} {rows}'


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {_PREFIX}{name} {text}"
    yield f"# TYPE {_PREFIX}{name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
