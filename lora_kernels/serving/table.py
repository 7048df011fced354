"""`Table`: which adapters a pool knows, which are in memory, and who uses them. It holds the pool's one lock, and does
no work that takes long."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

from lora_kernels.core.rows import BASE_NAMES
from lora_kernels.serving.source import Source, Values
from lora_kernels.serving.version import Acquired, Counts, PoolFull, Version


class Table:
    """The names, the versions on the device and their users.

    Methods take the lock `changed` themselves, but for those with a leading underscore, whose callers hold it.
    """

    def __init__(self, device_bytes: int | None) -> None:
        self.budget = device_bytes
        self.changed = threading.Condition()
        """The one lock. It is notified when memory, a load or a lease becomes free."""
        self.current: dict[str, Version] = {}
        """The version of each name that a new lease gets."""
        self.resident: dict[Version, None] = {}
        """The versions on the device, and those for which room is reserved."""
        self.by_slot: dict[int, Version] = {}
        """The versions on the device by their slots."""
        self._idle: OrderedDict[Version, None] = OrderedDict()
        """Those that may leave, the one first that was used the longest time ago."""
        self._idle_bytes = 0
        self.used = 0
        """The bytes of `resident`."""
        self.left: list[int] = []
        """Slots whose adapters have left the table, but not the stacks yet."""
        self.free: list[int] = []
        """Slots that are empty in the stacks."""
        self.slots = 0
        """The number of places in the stacks."""
        self.queue: deque[object] = deque()
        """The leases that wait for room, in the order in which they came."""
        self.counts = Counts()
        self.closed = False
        self._numbers = itertools.count(1)

    def version(self, name: str, source: Source, pinned: bool, given: Values | None, fixed: bool) -> Version:
        """Return a new version, which nobody can lease yet. Numbers are never used twice, so that a key stands for one
        version as long as the pool lives."""
        return Version(name, next(self._numbers), source, pinned, given, fixed=fixed)

    def add(self, version: Version) -> None:
        """Make the name of `version` known. Raises ValueError where it is known."""
        with self.changed:
            self._check_free(version.name)
            self.current[version.name] = version

    def check_free(self, name: str) -> None:
        """Raise ValueError where a name is known."""
        with self.changed:
            self._check_free(name)

    def switch(self, version: Version) -> Version:
        """Make `version` the one that new leases get, unless a later one is, and return the earlier of the two. Raises
        KeyError where its name was removed in the meantime."""
        with self.changed:
            before = self._look_up([version.name])[version.name]
            old, new = sorted((before, version), key=lambda each: each.number)
            self.current[version.name] = new
            self._retire(old)
            return old

    def remove(self, name: str) -> Version:
        """Forget a name, and return its version. Raises KeyError for an unknown one."""
        with self.changed:
            version = self._look_up([name])[name]
            del self.current[name]
            self.counts.rows.pop(name, None)
            self._retire(version)
            return version

    def drop(self, version: Version) -> None:
        """Forget a version that could not be loaded."""
        with self.changed:
            if self.current.get(version.name) is version:
                del self.current[version.name]
            self._retire(version)

    def look_up(self, name: str) -> Version:
        """Return the version that a new lease would get. Raises KeyError for an unknown name."""
        with self.changed:
            return self._look_up([name])[name]

    def acquire(self, names: Iterable[str | None], timeout: float) -> Acquired:
        """Use the current version of each name once more, and reserve room for those that are not on the device, all at
        once: a call that waits for room holds nothing.

        Raises KeyError for an unknown name, and PoolFull where there is no room in time.
        """
        wanted = [name for name in names if name not in BASE_NAMES]
        acquired = self._admit(lambda: self._look_up(wanted), timeout)
        with self.changed:
            self.counts.hits += len(acquired.versions) - len(acquired.loads)
            self.counts.misses += len(acquired.loads)
        return acquired

    def acquire_version(self, version: Version, timeout: float) -> Acquired:
        """Do the same for one version, which need not be current."""
        return self._admit(lambda: {version.name: version}, timeout)

    def _admit(self, look_up: Callable[[], dict[str, Version]], timeout: float) -> Acquired:
        until = time.monotonic() + timeout
        turn: object | None = None
        with self.changed:
            try:
                while True:
                    wanted = look_up()
                    missing = [each for each in wanted.values() if each.slot is None and each.loading is None]
                    mine = not self.queue or self.queue[0] is turn
                    if not missing or (mine and self._make_room(missing, wanted.values())):
                        break
                    self._refuse_what_never_fits(missing, wanted.values())
                    if turn is None:
                        turn = object()
                        self.queue.append(turn)
                    left = until - time.monotonic()
                    if left <= 0:
                        raise PoolFull(self._told(missing, timeout))
                    self.changed.wait(left)
            finally:
                if turn is not None:
                    self.queue.remove(turn)
                    self.changed.notify_all()
            for version in missing:
                self._reserve(version)
            for version in wanted.values():
                self._use(version)
            loads = [each.loading for each in wanted.values() if each.loading is not None]
            return Acquired(wanted, missing, loads)

    def reserve(self, name: str) -> Acquired:
        """Reserve room for the current version of a name where it is not on the device, but do not use it. Raises
        KeyError for an unknown name, and PoolFull where there is no room now."""
        with self.changed:
            wanted = self._look_up([name])
            version = wanted[name]
            if version.slot is not None or version.loading is not None:
                return Acquired(wanted, [], [version.loading] if version.loading is not None else [])
            self._refuse_what_never_fits([version], [version])
            if self.queue or not self._make_room([version], [version]):
                raise PoolFull(self._told([version], 0.0))
            return Acquired(wanted, [version], [self._reserve(version)])

    def release(self, versions: Iterable[Version]) -> bool:
        """End a use of each version, and return whether slots were left that are to be emptied."""
        with self.changed:
            for version in versions:
                version.users -= 1
                if not version.users:
                    self._rest(version)
            if self.queue or self.left:
                self.changed.notify_all()
            return bool(self.left)

    def place(self) -> tuple[int, int]:
        """Return an empty slot of the stacks, or the number of a new one at their end, and how long they are then."""
        with self.changed:
            if not self.free:
                self.free.append(self.slots)
                self.slots += 1
            return self.free.pop(), self.slots

    def loaded(self, version: Version, slot: int, seconds: float) -> None:
        """Say that the stacks hold `version` at `slot`."""
        with self.changed:
            self.counts.loads += 1
            self.counts.load_seconds += seconds
            self.by_slot[slot] = version
            version.slot, loading, version.loading = slot, version.loading, None
            if not version.users:
                self._rest(version)
            self.changed.notify_all()
        assert loading is not None
        loading.set_result(version.key)

    def failed(self, version: Version, error: BaseException) -> None:
        """Say that `version` could not be loaded, and give back the room that was reserved for it."""
        with self.changed:
            self.resident.pop(version, None)
            self.used -= version.nbytes
            loading, version.loading = version.loading, None
            self.changed.notify_all()
        assert loading is not None
        loading.set_exception(error)

    def leaving(self) -> list[int]:
        """Return the slots that are to be emptied; the caller does it, and then calls `emptied`."""
        with self.changed:
            left, self.left = self.left, []
            return left

    def emptied(self, slots: Iterable[int]) -> None:
        """Say that the stacks hold nothing at these slots."""
        with self.changed:
            self.free.extend(slots)

    def wait_unused(self, version: Version, timeout: float) -> None:
        """Wait until no lease holds `version`. Raises TimeoutError where one does after `timeout` seconds."""
        with self.changed:
            if not self.changed.wait_for(lambda: not version.users, timeout):
                raise TimeoutError(f"{version.key} is held by {version.users} leases after {timeout:g} s")

    def count(self, slots: Iterable[int], rows: Iterable[int]) -> None:
        """Count rows that were given to the adapters at these slots. A slot below 0 is the base."""
        with self.changed:
            for slot, number in zip(slots, rows, strict=True):
                version = self.by_slot.get(slot)
                if version is not None and number:
                    self.counts.rows[version.name] += number

    def close(self) -> bool:
        """Take no more calls, and return whether this is the first call of `close`. Raises RuntimeError where leases
        are open."""
        with self.changed:
            held = list(self._holders(each for each in self.resident if each.users))
            if held:
                raise RuntimeError(f"leases are open: {', '.join(held)}. Close them first")
            first, self.closed = not self.closed, True
            self.current.clear()
            self.changed.notify_all()
            return first

    def _check_free(self, name: str) -> None:
        self._check_open()
        if name in self.current:
            raise ValueError(
                f"an adapter {name!r} is registered already: update() makes another version of it, and remove() frees "
                "the name"
            )

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("this AdapterPool was closed")

    def _look_up(self, names: Iterable[str | None]) -> dict[str, Version]:
        """Return the current version of each name. Raises KeyError that names the unknown ones."""
        self._check_open()
        try:
            return {name: self.current[name] for name in names}  # type: ignore[index,misc]
        except KeyError:
            unknown = sorted({str(name) for name in names if name not in self.current})
            known = list(itertools.islice(self.current, 20))
            more = f" and {len(self.current) - 20} more" if len(self.current) > 20 else ""
            raise KeyError(
                f"no adapter is called {', '.join(unknown)}; registered are {', '.join(known) or 'none'}{more}"
            ) from None

    def _use(self, version: Version) -> None:
        version.users += 1
        if self._idle.pop(version, self) is None:
            self._idle_bytes -= version.nbytes

    def _rest(self, version: Version) -> None:
        """Let a version go that has no users: it may leave the device, or it leaves at once where it is retired."""
        if version.slot is None or version.users:
            return
        if version.retired:
            self._leave(version)
        elif not version.fixed:
            self._idle[version] = None
            self._idle_bytes += version.nbytes

    def _leave(self, version: Version) -> None:
        assert version.slot is not None
        if self._idle.pop(version, self) is None:
            self._idle_bytes -= version.nbytes
        del self.resident[version]
        self.used -= version.nbytes
        self.left.append(version.slot)
        del self.by_slot[version.slot]
        version.slot = None

    def _retire(self, version: Version) -> None:
        version.retired = True
        if version.slot is not None and not version.users:
            self._leave(version)
        self.changed.notify_all()

    def _reserve(self, version: Version) -> Future[str]:
        version.loading = Future()
        version.loading.set_running_or_notify_cancel()  # nobody can cancel a load
        self.resident[version] = None
        self.used += version.nbytes
        return version.loading

    def _make_room(self, missing: list[Version], wanted: Iterable[Version]) -> bool:
        """Evict what was used the longest time ago, and is not wanted, until `missing` fits. Return False, and evict
        nothing, where that is not enough."""
        need = sum(each.nbytes for each in missing)
        if self.budget is None or self.used + need <= self.budget:
            return True
        kept = {each for each in wanted if each in self._idle}
        if self.used - self._idle_bytes + sum(each.nbytes for each in kept) + need > self.budget:
            return False
        for version in [each for each in self._idle if each not in kept]:
            if self.used + need <= self.budget:
                break
            self._leave(version)
            self.counts.evictions += 1
        return True

    def _refuse_what_never_fits(self, missing: list[Version], wanted: Iterable[Version]) -> None:
        """Raise PoolFull where the adapters of one lease do not fit beside those that never leave."""
        fixed = [each for each in self.resident if each.fixed]
        need = sum(each.nbytes for each in {*wanted, *fixed})
        if self.budget is not None and need > self.budget:
            raise PoolFull(
                f"{', '.join(each.key for each in missing)} cannot be loaded: this lease takes {need:,} bytes with the "
                f"{sum(each.nbytes for each in fixed):,} that are pinned, and device_bytes is {self.budget:,}"
            )

    def _told(self, missing: list[Version], timeout: float) -> str:
        holders = list(self._holders(self.resident))
        return (
            f"no room for {', '.join(f'{each.key} ({each.nbytes:,} bytes)' for each in missing)} after {timeout:g} s: "
            f"{self.used:,} of {self.budget:,} bytes are in use, held by {', '.join(holders) or 'nobody'}; "
            f"{len(self.queue)} leases wait"
        )

    def _holders(self, versions: Iterable[Version]) -> Iterator[str]:
        for each in versions:
            if each.users:
                yield f"{each.key} ({each.users} leases, {each.nbytes:,} bytes)"
            elif each.pinned:
                yield f"{each.key} (pinned, {each.nbytes:,} bytes)"
