"""`Residents`: the adapters of a pool on the device, how they get there, and how they leave."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from lora_kernels.core import operands
from lora_kernels.core.many import stored
from lora_kernels.models.adapter_files import LayerAdapter
from lora_kernels.serving.host import HostTier, nbytes_of
from lora_kernels.serving.layer import PooledLinear
from lora_kernels.serving.source import Place, Source, Values
from lora_kernels.serving.table import Table
from lora_kernels.serving.version import Acquired, PoolFull, Version

_LOADERS = 4
"""The threads that load adapters. They wait for the disk most of the time."""


class Residents:
    """The layers of a pool, whose stacks hold the adapters on the device, and the threads that load into them."""

    def __init__(
        self,
        table: Table,
        layers: Mapping[str, PooledLinear],
        places: Mapping[str, Place],
        device: torch.device,
        host: HostTier | None,
        pin: bool,
    ) -> None:
        self.table = table
        self.ids = frozenset(map(id, layers.values()))
        """The layers, each as its ``id``."""
        self.host = host
        """The tier between the device and the disk; None on a CPU."""
        self._layers, self._places, self._device, self._pin = layers, places, device, pin
        self._stacks = threading.Lock()
        """Held while the stacks of the layers are changed, which threads must do in turns. No call of a layer waits
        for it."""
        self._loaders = ThreadPoolExecutor(_LOADERS, thread_name_prefix="lora_kernels.pool")

    def version(self, name: str, source: Source, pinned: bool, values: Values | None) -> Version:
        """Return a new version, which nobody can lease yet. `values` are those of an adapter without a file. Raises
        ValueError for values that are not finite, and PoolFull where the host's memory has no room for them."""
        given = None if values is None else self._copies(source, values, copy=self.host is not None)
        if given is not None and self.host is not None:
            with self.table.changed:
                if not self.host.reserve(nbytes_of(given)):
                    raise PoolFull(
                        f"{source.label} takes {nbytes_of(given):,} bytes in the host's memory, of which "
                        f"{self.host.used:,} of {self.host.budget:,} are in use"
                    )
        return self.table.version(name, source, pinned, given, pinned or (given is not None and self.host is None))

    def start(self, versions: Iterable[Version]) -> None:
        """Begin to load versions for which room is reserved."""
        for version in versions:
            self._loaders.submit(self._load, version)

    def ready(self, acquired: Acquired, until: float) -> None:
        """Load what is missing, and return when all is on the device. On an error the versions are released. Raises the
        error of a load, or TimeoutError where one has not ended at `until`."""
        try:
            self.start(acquired.missing)
            for load in acquired.loads:
                try:
                    load.result(max(until - time.monotonic(), 0.0))
                except concurrent.futures.TimeoutError:
                    if load.done():  # an error of the load itself
                        raise
                    names = ", ".join(map(repr, acquired.versions))
                    raise TimeoutError(f"a load of {names} has not ended in time") from None
        except BaseException:
            self.release(acquired.versions.values())
            raise

    def release(self, versions: Iterable[Version]) -> None:
        """End a use of each version."""
        if self.table.release(versions):
            self.sweep()

    def forget(self, version: Version) -> None:
        """Free what is kept of a version that was retired, but for what leases hold."""
        if self.host is not None:
            with self.table.changed:
                self.host.drop(version)
                if version.given is not None and not version.forgotten:
                    self.host.used -= nbytes_of(version.given)
                version.forgotten = True
        self.sweep()

    def sweep(self) -> None:
        """Empty the slots of adapters that have left."""
        with self._stacks:
            slots = self.table.leaving()
            for layer in self._layers.values() if slots else ():
                if any(layer.stack[slot] is not None for slot in slots):
                    layer.stack.replace(dict.fromkeys(slots))
            self.table.emptied(slots)

    def shutdown(self) -> None:
        """Wait for the loads that are under way, and take no more."""
        self._loaders.shutdown()

    def _load(self, version: Version) -> None:
        started = time.perf_counter()
        try:
            self.sweep()  # what was evicted for this one
            with torch.inference_mode(False), torch.no_grad():
                adapters = self._on_device(version)
            slot = self._put(adapters)
        except BaseException as error:
            self.table.failed(version, error)
            return
        self.table.loaded(version, slot, time.perf_counter() - started)
        self.sweep()  # where it was retired in the meantime

    def _on_device(self, version: Version) -> dict[str, operands.Adapter]:
        """Return the adapter of each layer in the layout of the kernels."""
        values = self._values(version)
        found = {}
        for name, (a, b) in values.items():
            a, b = (t.to(self._device, non_blocking=self._pin) for t in (a, b))
            found[name] = stored(a, b, version.source.scales[name])
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the copies may be dropped after this
        elif self.host is None:
            version.given = None  # the stacks hold the only copy now
        return found

    def _values(self, version: Version) -> Values:
        """Return A and B of each layer in the host's memory."""
        if version.given is not None:
            return version.given
        if self.host is not None:
            with self.table.changed:
                kept = self.host.get(version)
            if kept is not None:
                return kept
        values = self._copies(version.source, version.source.read())
        if self.host is not None:
            with self.table.changed:
                if not version.retired:
                    self.host.put(version, values)
        return values

    def _copies(self, source: Source, values: Values, copy: bool = False) -> Values:
        """Return A and B of each layer in the dtype in which they are served, and page-locked where that is wanted.
        Without `copy` they may be the same tensors. Raises ValueError for values that are not finite."""
        found = {}
        for name, adapter in values.items():
            parts = [t.detach().to("cpu", self._places[name].dtype, copy=copy) for t in adapter]
            if not all(bool(t.isfinite().all()) for t in parts):
                raise ValueError(f"{source.label}: the adapter of {name} is not finite in {parts[0].dtype}")
            found[name] = LayerAdapter(*(t.pin_memory() if self._pin else t for t in parts))
        return found

    def _put(self, adapters: Mapping[str, operands.Adapter]) -> int:
        """Put an adapter into an empty slot of the stacks, and return the slot's number."""
        with self._stacks:
            slot, size = self.table.place()
            for name, layer in self._layers.items():
                adapter = adapters.get(name)
                if adapter is not None or len(layer.stack) < size:
                    layer.stack.replace({slot: adapter}, size)
        return slot
