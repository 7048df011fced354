"""`AdapterPool`: many adapters over one base, of which those that are in use are in memory."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import nn

from lora_kernels.core.rows import BASE, BASE_NAMES, Rows
from lora_kernels.models.names import plain_names
from lora_kernels.models.targets import some, told_by_reason
from lora_kernels.nn.mixed import Mixable, Mixed
from lora_kernels.serving.host import HostTier
from lora_kernels.serving.layer import device_of, install, place_of
from lora_kernels.serving.lease import Lease
from lora_kernels.serving.metrics import PoolStats, prometheus
from lora_kernels.serving.residents import Residents
from lora_kernels.serving.source import AdapterSource, Targets, opened
from lora_kernels.serving.table import Table
from lora_kernels.serving.version import PoolFull, Registration, Version

__all__ = ["AdapterPool", "Lease", "PoolFull", "PoolStats", "Registration"]

_TIMEOUT = 60.0
"""The seconds that a lease waits for room, unless it says otherwise."""


class AdapterPool:
    """Many LoRA adapters for one model. Those in use are on the device, and the others are on the disk or in the host's
    memory.

    The pool puts a layer of its own in the place of every linear layer that can have adapters, until `close`. Outside
    of a lease the model computes what it did before, bit for bit. Inside, each sample or row gets its own adapter:

        with pool.lease(["a", "b"]) as lease, lease.mixed(["a", None, "b"]):
            y = model(x)

    Methods may be called by several threads at once. A lease keeps the versions that it began with.

    Args:
        model: a model with ``nn.Linear`` or fresh `QuantizedLoRALinear` layers on one device. It is changed in place.
        device_bytes: the most bytes that adapters may take on the device; None for no limit. On a CPU that is the
            memory.
        host_bytes: the most bytes of copies in the host's memory, beside a GPU; None for no limit.
        dtype: the dtype of A and B in memory: that of the weights, or fp32 beside 16 bits. None is the weights'.
        pin_memory: whether the copies in the host's memory are page-locked. None: with CUDA.

    Raises:
        ValueError: a model with a pool, with layers of PEFT, with adapters of its own, without a linear layer, or on
            several devices; host_bytes or pin_memory without a GPU; a budget below 1.
        TypeError: a dtype that does not go with the weights'.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        dtype: torch.dtype | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        for what, budget in (("device_bytes", device_bytes), ("host_bytes", host_bytes)):
            if budget is not None and budget < 1:
                raise ValueError(f"{what} must be at least 1, or None for no limit, got {budget}")
        self.model = model
        names = frozenset(name for name, _, _ in plain_names(model))
        self._layers, passed_over, self._put_back = install(model)
        try:
            device = device_of(self._layers)
            if device.type == "cpu" and (host_bytes is not None or pin_memory):
                what = "host_bytes" if host_bytes is not None else "pin_memory"
                raise ValueError(f"{what} is for a model on a GPU: on a CPU device_bytes counts all memory")
            places = {name: place_of(name, layer, dtype) for name, layer in self._layers.items()}
        except BaseException:
            self._put_back()
            raise
        pin = device.type == "cuda" if pin_memory is None else pin_memory
        host = HostTier(host_bytes) if device.type != "cpu" else None
        self._targets = Targets(places, passed_over, names)
        self._table = Table(device_bytes)
        self._residents = Residents(self._table, self._layers, places, device, host, pin)

    def register(self, name: str, source: AdapterSource, pinned: bool = False, *, config: Any = None) -> Registration:
        """Make an adapter known under `name`, and return what was found in it.

        Of a folder in PEFT's format the config and the header of the weights are read and checked now, and the values
        when a lease needs them. A state dict is copied now; without a file to come back from, it stays in the memory
        of a CPU, and in the host's memory beside a GPU.

        Args:
            name: any text but "" and "__base__".
            source: the folder, or a state dict with the names that PEFT's files have.
            pinned: load the adapter now and keep it on the device until it is removed.
            config: for a state dict, the ``LoraConfig`` or a dictionary of its fields.

        Warns where the adapter has layers that the pool does not serve, or lacks layers that its config names.

        Raises:
            ValueError: a name that is taken; files that are damaged, or not of one adapter; an adapter that matches no
                layer, with both lists of names; other shapes or ranks; a config with something that is not served
                (DoRA, lora_bias, modules_to_save, ...); values that are not finite in the pool's dtype.
            FileNotFoundError: a missing file.
            PoolFull: no room for an adapter that has to be loaded now.
            After any of these, the pool is as it was.
        """
        if not isinstance(name, str) or name in ("", *BASE_NAMES):
            raise ValueError(f"the name of an adapter must be a text other than '' and '__base__', got {name!r}")
        self._table.check_free(name)
        version = self._new(name, source, pinned, config)
        try:
            self._table.add(version)
            if version.fixed:
                self._load_now(version)
        except BaseException:
            self._drop(version)
            raise
        return Registration.of(version)

    def update(self, name: str, source: AdapterSource, *, config: Any = None) -> Registration:
        """Make another version of the adapter `name`, and return what was found in it. Leases that are open keep the
        version that they have, and new ones get the new one. The memory of the old one is free when its last lease
        ends. Where the old one was on the device, the new one is loaded before it takes its place.

        A state dict without `config` has the settings of the version before. Otherwise the arguments and errors are
        those of `register`; KeyError for an unknown name.
        """
        before = self._table.look_up(name)
        if config is None and not isinstance(source, (str, os.PathLike)):
            config = before.source.config
        version = self._new(name, source, before.pinned, config)
        try:
            if version.fixed or before.slot is not None:
                self._load_now(version)
            old = self._table.switch(version)
        except BaseException:
            self._drop(version)
            raise
        self._residents.forget(old)
        return Registration.of(version)

    def remove(self, name: str, wait: bool = False, timeout: float = _TIMEOUT) -> None:
        """Forget an adapter. Open leases keep it until they end; with `wait` this call returns when the last one has.

        Raises KeyError for an unknown name, and TimeoutError where a lease is open after `timeout` seconds; the name is
        forgotten all the same.
        """
        version = self._table.remove(name)
        self._residents.forget(version)
        if wait:
            self._table.wait_unused(version, timeout)

    def lease(self, names: Iterable[str | None], timeout: float = _TIMEOUT) -> Lease:
        """Return a `Lease` of these adapters, each in the version that is current. None and "__base__" are the base.

        Those that are not on the device are loaded, in the place of the ones that nobody has used for the longest time
        where room is short. A lease whose adapters are on the device waits for nothing. Others wait their turn where
        there is no room, and hold nothing while they wait.

        Raises:
            KeyError: for an unknown name, before anything is done.
            PoolFull: there was no room for `timeout` seconds, with the adapters that take it and who holds them.
            TimeoutError: a load has not ended after `timeout` seconds.
            ValueError, FileNotFoundError: an adapter's files cannot be read, or are not those that were registered.
        """
        if isinstance(names, str):
            raise TypeError(f"lease takes a list of names, got the text {names!r}: lease([{names!r}])")
        names = list(names)
        until = time.monotonic() + timeout
        while True:
            acquired = self._table.acquire(names, until - time.monotonic())
            if not acquired.loads:
                return Lease(self._residents, acquired.versions)
            try:
                self._residents.ready(acquired, until)
            except (ValueError, FileNotFoundError):
                if any(each.retired for each in acquired.versions.values()):
                    continue  # the files were replaced, and `update` has made another version of them
                raise
            return Lease(self._residents, acquired.versions)

    def prefetch(self, name: str) -> Future[str]:
        """Begin to load an adapter, and return a Future of its key. It is done at once where the adapter is on the
        device, and has the error PoolFull where there is no room now. Raises KeyError for an unknown name."""
        answer: Future[str] = Future()
        try:
            acquired = self._table.reserve(name)
        except PoolFull as error:
            answer.set_exception(error)
            return answer
        self._residents.start(acquired.missing)
        if acquired.loads:
            return acquired.loads[0]
        answer.set_result(acquired.versions[name].key)
        return answer

    def names(self) -> list[str]:
        """Return the names that can be leased, in the order of their registration."""
        with self._table.changed:
            return list(self._table.current)

    def key(self, name: str) -> str:
        """Return "name@version" of the version that a new lease would get. Caches of keys and values that an adapter
        has computed must be salted with it; `Lease.key` says which version a lease has. Raises KeyError for an unknown
        name."""
        return self._table.look_up(name).key

    def mixed(self, leases: Sequence[Lease | None], lengths: Sequence[int] | None = None) -> Mixed:
        """Return the context in which the model computes each sample with the adapter of its own lease, or with the
        base alone for None. So requests of one batch may hold different versions of one adapter.

        Args:
            leases: one for each sample, of one adapter each.
            lengths: the number of tokens of each sample, where they follow each other in one packed row of x.

        Raises ValueError for a lease of more adapters than one, or for lengths of another number.
        """
        found = [None if lease is None else _only(lease) for lease in leases]
        numbers = [BASE if each is None or each.slot is None else each.slot for each in found]
        table = {each.key: number for each, number in zip(found, numbers, strict=True) if each is not None}
        ids = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        rows = ids if lengths is None else Rows.by_length(lengths, numbers)
        context = Mixed(Mixable(self._residents.ids, table), rows)
        self.count(numbers, lengths or [1] * len(numbers))
        return context

    def count(self, numbers: Iterable[int], rows: Iterable[int]) -> None:
        """Count rows for `PoolStats.rows`: so many for the adapter of each number of a lease, and none for -1. Contexts
        of leases and of `mixed` do it themselves."""
        self._table.count(numbers, rows)

    def stats(self) -> PoolStats:
        """Return the numbers of this moment."""
        table = self._table
        with table.changed:
            counts = table.counts
            return PoolStats(
                registered=len(table.current),
                resident=sum(each.slot is not None for each in table.resident),
                leased=sum(each.users > 0 for each in table.resident),
                waiting=len(table.queue),
                hits=counts.hits,
                misses=counts.misses,
                loads=counts.loads,
                load_seconds=counts.load_seconds,
                evictions=counts.evictions,
                device_bytes=table.used,
                host_bytes=self._residents.host.used if self._residents.host is not None else 0,
                disk_bytes=sum(each.source.disk_bytes for each in table.current.values()),
                rows=dict(counts.rows),
            )

    def metrics(self) -> str:
        """Return the numbers of this moment in Prometheus' text format."""
        return prometheus(self.stats())

    def close(self) -> None:
        """Put the model's own layers back, and free all memory. Every other method raises RuntimeError from then on.
        Raises RuntimeError, and changes nothing, where leases are open."""
        if self._table.close():
            self._residents.shutdown()
            self._put_back()
            self._layers.clear()

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new(self, name: str, source: AdapterSource, pinned: bool, config: Any) -> Version:
        """Return a new version of an adapter, checked. Warns of layers that are not served or lacking."""
        found, values = opened(name, source, config, self._targets)
        if found.passed_over:
            warnings.warn(
                f"{found.label} has layers that are not served: {told_by_reason(found.passed_over)}", stacklevel=3
            )
        if found.missing:
            warnings.warn(
                f"{found.label} has no values for layers that its config names: {some(found.missing)}", stacklevel=3
            )
        return self._residents.version(name, found, pinned, values)

    def _load_now(self, version: Version) -> None:
        """Load a version that is not current yet, or pinned."""
        acquired = self._table.acquire_version(version, _TIMEOUT)
        self._residents.ready(acquired, time.monotonic() + _TIMEOUT)
        self._residents.release(acquired.versions.values())

    def _drop(self, version: Version) -> None:
        self._table.drop(version)
        self._residents.forget(version)


def _only(lease: Lease) -> Version:
    """Return the one adapter of a lease."""
    if len(lease.versions) != 1:
        raise ValueError(f"a sample has a lease of one adapter, or None, got {lease!r}")
    return lease.versions[0]
