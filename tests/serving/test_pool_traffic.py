"""What a pool does under traffic: loads, evictions, waits, updates and removals, by several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.pool_adapters import base, batches, given, saved, with_given
from torch import nn

from lora_kernels.core.many import panel_stride
from lora_kernels.serving import source
from lora_kernels.serving.host import HostTier
from lora_kernels.serving.pool import AdapterPool, PoolFull

SETTINGS = {"r": 4, "lora_alpha": 6}
SHORT = 0.05
"""Seconds after which a lease that cannot be served gives up."""


class Gate:
    """Makes reading files wait until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached, self.reads = threading.Event(), threading.Event(), 0
        read = source.read_weights

        def slow(path: Path) -> dict[str, torch.Tensor]:
            self.reads += 1
            self.reached.set()
            assert self.opened.wait(10)
            return read(path)

        monkeypatch.setattr(source, "read_weights", slow)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the adapters "0" to "5", of one size."""
    for i in range(6):
        saved(tmp_path / str(i), i)
    return tmp_path


def pool_of(folder: Path, room: int | None = None, names: str = "012345", **keywords) -> AdapterPool:
    """Return a pool with adapters of one size, and with room for so many of them."""
    pool = AdapterPool(base())
    size = pool.register("0", folder / "0").nbytes
    pool.close()
    pool = AdapterPool(base(), device_bytes=None if room is None else room * size, **keywords)
    for name in names:
        pool.register(name, folder / name)
    return pool


def resident(pool: AdapterPool) -> set[str]:
    return {version.name for version in pool._table.resident if version.slot is not None}


def held(pool: AdapterPool) -> int:
    """Return the bytes that the stacks really hold."""
    parts = [t for layer in pool._layers.values() for each in layer.stack if each for t in (each.a, each.b)]
    return sum(t.untyped_storage().nbytes() for t in parts)


def check(pool: AdapterPool, name: str, model: nn.Module) -> None:
    """Hold that the pool computes what `model` does."""
    (x,) = batches(1, 2)
    with torch.no_grad(), pool.lease([name]) as lease, lease.mixed([name, None]):
        y = pool.model(x)
    torch.testing.assert_close(y[0], model(x)[0])
    assert torch.equal(y[1], base()(x)[1])


def test_the_least_recently_used_leaves_first_and_comes_back_right(folder):
    with pool_of(folder, 2) as pool:
        for name, there in (("0", "0"), ("1", "01"), ("0", "01"), ("2", "02"), ("3", "23"), ("1", "13")):
            check(pool, name, saved(folder / "x", int(name)))
            assert resident(pool) == set(there)
            assert held(pool) == pool.stats().device_bytes <= pool._table.budget
        stats = pool.stats()
        assert (stats.hits, stats.misses, stats.loads, stats.evictions) == (1, 5, 5, 3)
        assert {len(layer.stack) for layer in pool._layers.values()} == {2}  # slots are used again


def test_a_lease_does_not_evict_what_it_asks_for_itself(folder):
    with pool_of(folder, 2) as pool:
        for name in "01":
            pool.lease([name]).close()
        with pool.lease(["0", "2"]) as lease:  # 0 was used the longest time ago
            assert resident(pool) == {"0", "2"} and lease["0"] == 0
        assert (pool.stats().hits, pool.stats().loads, pool.stats().evictions) == (1, 3, 1)


def test_leased_and_pinned_adapters_stay_and_pool_full_says_who_holds_them(folder):
    with pool_of(folder, 2, "0123") as pool:
        pool.remove("3")
        pool.register("3", folder / "3", pinned=True)
        with pool.lease(["0"]):
            with pytest.raises(PoolFull, match=r"no room for 1@\d .* held by 3@\d \(pinned.*0@\d \(1 leases"):
                pool.lease(["1"], timeout=SHORT)
            assert isinstance(pool.prefetch("1").exception(), PoolFull)
            with pytest.raises(PoolFull, match="device_bytes is"):
                pool.lease(["0", "1"])  # does not fit beside the pinned one, however long it waits
            assert resident(pool) == {"0", "3"} and pool.stats().waiting == 0
        check(pool, "1", saved(folder / "x", 1))
        assert resident(pool) == {"1", "3"}


def test_a_lease_that_waits_gets_the_room_that_another_frees(folder):
    with pool_of(folder, 2) as pool, ThreadPoolExecutor() as threads:
        first = pool.lease(["0", "1"])
        waiting = threads.submit(pool.lease, ["2", "3"])
        until(lambda: pool.stats().waiting == 1)
        behind = threads.submit(pool.lease, ["4"])
        until(lambda: pool.stats().waiting == 2)
        with pool.lease(["0"]):  # what is on the device waits for nobody
            pass
        first.close()
        with waiting.result(5) as lease:
            assert {lease["2"], lease["3"]} == {0, 1}
            assert not behind.done()
        behind.result(5).close()


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_load_blocks_no_row_whose_adapter_is_there(folder, gate):
    gate.opened.set()
    with pool_of(folder, 3) as pool, ThreadPoolExecutor() as threads:
        pool.lease(["0"]).close()
        gate.opened.clear()
        gate.reached.clear()
        loading = threads.submit(pool.lease, ["1"])
        assert gate.reached.wait(5)
        for _ in range(20):
            check(pool, "0", saved(folder / "x", 0))
            pool.metrics()
        pool.register("new", folder / "5")
        assert not loading.done()
        with pytest.raises(TimeoutError, match="a load of '1' has not ended"):
            pool.lease(["1"], timeout=SHORT)
        gate.opened.set()
        loading.result(5).close()


def test_concurrent_loads_of_one_name_are_one_load(folder, gate):
    with pool_of(folder, 3) as pool, ThreadPoolExecutor(8) as threads:
        future = pool.prefetch("0")
        leases = [threads.submit(pool.lease, ["0"]) for _ in range(4)]
        until(lambda: pool.stats().misses == 4)
        assert not future.done() and not future.cancel()
        gate.opened.set()
        slots = set()
        for lease in leases:
            with lease.result(5) as each:
                slots.add(each["0"])
        assert future.result(5) == pool.key("0") == pool.prefetch("0").result(0)
        assert gate.reads == pool.stats().loads == 1 and slots == {0}


def test_a_load_that_fails_gives_its_room_back_and_harms_no_other(folder):
    with pool_of(folder, 3) as pool:
        (folder / "1" / "adapter_model.safetensors").write_bytes(b"")
        for _ in range(3):
            with pytest.raises(ValueError, match="was changed since"):
                pool.lease(["0", "1", "2"])
        until(lambda: resident(pool) == {"0", "2"})  # the other loads have gone on
        stats = pool.stats()
        assert (stats.leased, stats.waiting) == (0, 0)
        assert held(pool) == stats.device_bytes
        with pool.lease(["0", "2", "3"]):
            pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["eager", "cpu"])
def test_each_request_sees_one_version_while_another_thread_updates(dtype):
    """The adapter's B is s times a fixed one in version s, so that the rows of a request tell which it has computed
    with, in both of the layers that it has."""
    layers = ("inner.fc", "head")
    state = given(1, 4, layers)
    (x,) = (x.to(dtype) for x in batches(1, 3))
    model, eps = base().to(dtype), 100 * torch.finfo(dtype).eps

    def version(s: int) -> dict[str, torch.Tensor]:
        return {key: value * (s if "lora_B" in key else 1) for key, value in state.items()}

    wanted = {s: with_given(version(s), 1.5).to(dtype)(x) for s in range(1, 13)}
    seen: set[int] = set()
    with AdapterPool(model, device_bytes=1 << 20) as pool, ThreadPoolExecutor() as threads:
        pool.register("a", version(1), config=SETTINGS)
        over = threading.Event()

        def generate() -> int:
            requests = 0
            while not over.is_set():
                with torch.no_grad(), pool.lease(["a"]) as lease:
                    key, found = lease.key("a"), set()
                    for _ in range(3):
                        with lease.mixed(["a"] * 3):
                            y = pool.model(x)
                        found |= {s for s, want in wanted.items() if torch.allclose(y, want, rtol=eps, atol=eps)}
                        time.sleep(0.001)
                    assert len(found) == 1, (key, found)
                    seen.update(found)
                    requests += 1
            return requests

        running = [threads.submit(generate) for _ in range(4)]
        keys = {pool.key("a")}
        until(lambda: 1 in seen)
        for s in range(2, 13):
            time.sleep(0.01)
            keys.add(pool.update("a", version(s)).key)
        until(lambda: 12 in seen)
        over.set()
        assert all(each.result(10) > 0 for each in running)
        assert len(keys) == 12
        assert len(pool._table.resident) == 1 and held(pool) == pool.stats().device_bytes  # the old ones are freed


def test_a_lease_keeps_its_version_while_requests_of_one_batch_hold_several(folder):
    with torch.no_grad(), pool_of(folder, 4) as pool:
        (x,) = batches(1, 3)
        old = pool.lease(["0"])
        pool.update("0", folder / "1")
        new = pool.lease(["0"])
        with pool.mixed([new, old, None]):
            y = pool.model(x)
        assert old.key("0") != new.key("0") == pool.key("0")
        for m, model in enumerate((saved(folder / "x", 1), saved(folder / "x", 0), base())):
            torch.testing.assert_close(y[m], model(x)[m])
        with pool.mixed([old, None, new], lengths=[1, 0, 2]):
            z = pool.model(x)
        torch.testing.assert_close(z[0], saved(folder / "x", 0)(x)[0])
        torch.testing.assert_close(z[1:], saved(folder / "x", 1)(x)[1:])
        assert pool.stats().rows == {"0": 5}
        before = pool.stats().device_bytes
        old.close()
        assert held(pool) == pool.stats().device_bytes == before / 2
        new.close()
        with pytest.raises(ValueError, match="a lease of one adapter"):
            pool.mixed([new])


def test_an_update_of_what_is_in_memory_is_in_memory_before_it_is_leased(folder):
    with pool_of(folder) as pool:
        pool.lease(["0"]).close()
        for name in "01":  # 1 is not, and stays on the disk
            pool.update(name, folder / "2")
        assert resident(pool) == {"0"} and pool.stats().loads == 2
        misses = pool.stats().misses
        check(pool, "0", saved(folder / "x", 2))
        assert pool.stats().misses == misses


def test_a_lease_that_meets_replaced_files_takes_the_new_version(folder, gate):
    gate.opened.set()
    with pool_of(folder) as pool, ThreadPoolExecutor() as threads:
        want = saved(folder / "0", 9)  # a trainer writes over the files ...
        gate.opened.clear()
        lease = threads.submit(pool.lease, ["1", "0"])
        until(lambda: pool.stats().misses == 2)
        pool.update("0", folder / "0")  # ... and then tells the pool
        gate.opened.set()
        lease.result(5).close()
        check(pool, "0", want)


def test_remove_frees_the_name_at_once_and_the_memory_with_the_last_lease(folder):
    with pool_of(folder) as pool, ThreadPoolExecutor() as threads:
        lease = pool.lease(["0", "1"])
        first = pool.key("0")
        with pytest.raises(TimeoutError, match=f"{first} is held by 1 leases"):
            pool.remove("0", wait=True, timeout=SHORT)
        with pytest.raises(KeyError, match="no adapter is called 0"):
            pool.lease(["0"])
        pool.register("0", folder / "5")
        assert pool.key("0") != first  # no key stands for two adapters
        removing = threads.submit(pool.remove, "1", wait=True)
        time.sleep(SHORT)
        assert not removing.done() and held(pool) == pool.stats().device_bytes > 0
        lease.close()
        removing.result(5)
        assert held(pool) == pool.stats().device_bytes == 0
        lease.close()  # does nothing


@pytest.fixture
def two_tiers(folder: Path) -> Iterator[AdapterPool]:
    """Return a pool that keeps copies between the device and the disk, as beside a GPU: room for one adapter on the
    device, and for two copies."""
    with pool_of(folder, 1) as pool:
        size = sum(t.numel() * t.element_size() for t in given(0).values())
        pool._residents.host = HostTier(2 * size)
        yield pool


def test_copies_in_the_hosts_memory_save_reading_the_files_again(two_tiers, folder, gate):
    gate.opened.set()
    for name, reads in (("0", 1), ("1", 2), ("0", 2), ("2", 3), ("0", 3), ("1", 4)):  # 2 took the place of 1's copy
        check(two_tiers, name, saved(folder / "x", int(name)))
        assert gate.reads == reads, name
    assert two_tiers.stats().host_bytes == two_tiers._residents.host.budget
    two_tiers.remove("1")
    assert two_tiers.stats().host_bytes == two_tiers._residents.host.budget // 2
    two_tiers.update("0", folder / "3")
    check(two_tiers, "0", saved(folder / "x", 3))


def test_a_state_dict_stays_in_the_hosts_memory_when_it_leaves_the_device(two_tiers, folder):
    state = given(7)
    handed = {key: value.clone() for key, value in state.items()}
    two_tiers.register("a", handed, config=SETTINGS)
    for value in handed.values():
        value.zero_()  # the pool has a copy
    assert two_tiers.stats().resident == 0
    for _ in range(2):
        check(two_tiers, "a", with_given(state, 1.5))
        check(two_tiers, "0", saved(folder / "x", 0))
    two_tiers.register("b", given(8), config=SETTINGS)  # in the place of the copy of "0"
    before = two_tiers.stats()
    with pytest.raises(PoolFull, match="in the host's memory"):
        two_tiers.register("c", given(9), config=SETTINGS)
    assert two_tiers.stats() == before
    two_tiers.update("b", folder / "3")
    two_tiers.register("c", given(9), config=SETTINGS)
    check(two_tiers, "c", with_given(given(9), 1.5))
    for name in "abc":
        two_tiers.remove(name)
    check(two_tiers, "0", saved(folder / "x", 0))
    assert two_tiers.stats().host_bytes == two_tiers._residents.host.budget // 2


def test_close_refuses_while_leases_are_open(folder):
    pool = pool_of(folder)
    with pool.lease(["0"]):
        with pytest.raises(RuntimeError, match="leases are open: 0@"):
            pool.close()
        check(pool, "0", saved(folder / "x", 0))
    pool.close()


def test_an_adapter_of_rank_256_costs_its_own_bytes_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512, bias=False)).requires_grad_(False)

    def state(r: int) -> dict[str, torch.Tensor]:
        return {
            "base_model.model.0.lora_A.weight": torch.randn(r, 256),
            "base_model.model.0.lora_B.weight": torch.randn(512, r),
        }

    with AdapterPool(model) as pool:
        small = [pool.register(f"s{i}", state(8), config={"r": 8, "lora_alpha": 8}).nbytes for i in range(4)]
        before = pool.stats().device_bytes
        large = pool.register("large", state(256), config={"r": 256, "lora_alpha": 8}).nbytes
        assert set(small) == {8 * 4 * (panel_stride(256, torch.float32) + panel_stride(512, torch.float32))}
        assert large == 32 * small[0] and pool.stats().device_bytes == before + large == held(pool)


def test_a_thousand_adapters_take_the_bytes_of_their_ranks_rounded_to_8():
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False)).to(torch.bfloat16).requires_grad_(False)
    ranks = [1, 3, 8, 13, 16]
    with AdapterPool(model) as pool:
        for i in range(50):
            r = ranks[i % 5]
            state = {
                f"base_model.model.0.lora_{part}.weight": torch.zeros(*shape, dtype=torch.bfloat16)
                for part, shape in (("A", (r, 2048)), ("B", (2048, r)))
            }
            pool.register(str(i), state, config={"r": r, "lora_alpha": 8})
        rounded = 10 * sum(-(-r // 8) * 8 for r in ranks) * 2 * 2048 * 2
        assert held(pool) == pool.stats().device_bytes <= 1.05 * rounded


def test_a_lease_does_the_same_work_with_many_registered_adapters(folder):
    """The functions that a lease enters, and not the clock, which other programs disturb."""
    import sys

    def work(pool: AdapterPool) -> int:
        calls = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            for _ in range(5):
                pool.lease(["0", "1"]).close()
        finally:
            sys.setprofile(None)
        return calls

    with pool_of(folder) as pool:
        pool.lease(["0", "1"]).close()
        few = work(pool)
        for i in range(200):
            pool.register(f"n{i}", folder / "2")
        assert work(pool) == few
        assert {len(layer.stack) for layer in pool._layers.values()} == {2}  # rows know of those on the device only


def test_many_threads_lease_more_than_there_is_room_for(folder):
    """Each request computes with the adapter that it asked for, and nothing is lost in 4 threads with 2 places."""
    models = {str(i): saved(folder / "x", i) for i in range(6)}
    (x,) = batches(1, 2)
    with torch.no_grad():
        wanted = {name: model(x) for name, model in models.items()}
        wanted["__base__"] = base()(x)

    def work(seed: int) -> None:
        order = torch.randint(6, (25,), generator=torch.Generator().manual_seed(seed)).tolist()
        for i in order:
            name = str(i)
            with torch.no_grad(), pool.lease([name], timeout=20) as lease, lease.mixed([name, None]):
                y = pool.model(x)
            torch.testing.assert_close(y[0], wanted[name][0])
            assert torch.equal(y[1], wanted["__base__"][1])

    with pool_of(folder, 2) as pool, ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, seed) for seed in range(4)]:
            done.result(60)
        stats = pool.stats()
        assert stats.hits + stats.misses == 100 and stats.waiting == stats.leased == 0
        assert held(pool) == stats.device_bytes <= pool._table.budget
        assert stats.rows == {str(i): stats.rows[str(i)] for i in range(6)} and sum(stats.rows.values()) == 100
