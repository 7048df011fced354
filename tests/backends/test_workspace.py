"""The memory of launches, with streams as numbers and captures by hand. Needs no GPU."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lora_kernels.backends import workspace as memory
from lora_kernels.backends.workspace import Workspace

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_blocks", {})
    monkeypatch.setattr(memory, "_by_stream", {})


def ask(counters: int, floats: int = 0, stream: int = 5, capturing: bool = False) -> Workspace:
    return memory.workspace(CPU, stream, capturing, counters, floats)


def lines(workspace: Workspace) -> set[int]:
    """Return the cache lines that the counters lie on."""
    first = workspace.counters.data_ptr() // 128
    return set(range(first, first + -(-workspace.counters.numel() // memory.LINE)))


def apart(*workspaces: Workspace) -> bool:
    all_lines = [line for each in workspaces for line in lines(each)]
    return len(all_lines) == len(set(all_lines))


def test_launches_on_one_stream_share_their_counters() -> None:
    first = ask(10)
    assert first.counters.numel() >= 10 and not first.counters.any()
    assert ask(9).counters is first.counters
    assert apart(first, ask(9, stream=6))
    assert ask(10).counters is first.counters


def test_counters_that_are_too_few_are_replaced() -> None:
    first = ask(10)
    grown = ask(5000)
    assert grown.counters.numel() >= 5000 and not grown.counters.any() and apart(first, grown)
    assert ask(10).counters is grown.counters


def test_scratch_belongs_to_one_call() -> None:
    first, second = ask(10, 100), ask(10, 100)
    assert first.scratch.numel() == 100 and first.scratch.dtype == torch.float32
    assert first.scratch.data_ptr() != second.scratch.data_ptr()


def test_every_captured_launch_has_counters_of_its_own() -> None:
    kept = ask(10)
    captured = [ask(10, capturing=True) for _ in range(5)]
    assert apart(kept, *captured) and all(each.counters.numel() >= 10 for each in captured)
    assert ask(10).counters is kept.counters and not any(each.counters.any() for each in captured)


def test_captured_launches_get_no_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(10)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a fill would be captured into the graph")

    monkeypatch.setattr(torch, "zeros", fail)
    for _ in range(1000):
        ask(100, capturing=True)


def test_a_capture_that_comes_first_gets_zeros_of_the_graph() -> None:
    captured = ask(10, capturing=True)
    assert captured.counters.numel() == 10 and not captured.counters.any()
    assert not memory._blocks and not memory._by_stream


def test_a_capture_that_finds_no_room_gets_zeros_of_the_graph_and_the_next_call_makes_room() -> None:
    ask(10)
    while (captured := ask(1 << 15, capturing=True)).counters._base is not None:
        pass
    assert captured.counters.numel() == 1 << 15
    left = memory._blocks[CPU][-1].numel()
    ask(10)
    assert memory._blocks[CPU][-1].numel() > left
    assert ask(1 << 15, capturing=True).counters._base is not None


def test_no_block_is_freed_because_graphs_hold_addresses_in_it() -> None:
    """A graph keeps addresses and no tensor, so a block must outlive every tensor that was cut from it."""
    storages = []
    for _ in range(3):
        ask(10)
        storages.append(StorageWeakRef(memory._blocks[CPU][-1].untyped_storage()))
        while memory._blocks[CPU][-1].numel() >= memory.BLOCK // 4:
            ask(1 << 14, capturing=True)
    ask(5000)  # The counters of the stream are replaced, so that they keep no block alive.
    assert len({storage.cdata for storage in storages}) == 3
    assert not any(storage.expired() for storage in storages)


def test_more_counters_than_a_block_has_are_served() -> None:
    assert ask(3 * memory.BLOCK).counters.numel() >= 3 * memory.BLOCK


def test_the_block_is_allocated_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocations of the thread that calls may be routed into the pool of a graph."""
    threads, zeros = [], torch.zeros

    def watched(*args, **kwargs):
        threads.append(threading.get_ident())
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", watched)
    ask(10)
    ask(10)
    assert len(threads) == 1 and threads[0] != threading.get_ident()


def test_counters_are_ordinary_tensors_even_if_the_first_call_is_in_inference_mode() -> None:
    with torch.inference_mode():
        counters = ask(10).counters
    counters[0] = 1
    assert memory.clean() and not counters.any() and not memory.clean()


def test_several_threads_get_different_counters() -> None:
    got: list[Workspace] = []

    def run(stream: int) -> None:
        got.append(ask(10, stream=stream))
        got.extend(ask(10, stream=stream, capturing=True) for _ in range(200))

    threads = [threading.Thread(target=run, args=(stream,)) for stream in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8 * 201 and apart(*got)
