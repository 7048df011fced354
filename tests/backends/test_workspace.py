"""The memory that launches share, with streams and captures as numbers. Needs no GPU."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.backends import workspace as memory
from lora_kernels.backends.workspace import NOT_CAPTURING, UNNUMBERED, Workspace

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_workspaces", {})
    monkeypatch.setattr(memory, "_captured", {})


def ask(counters: int, floats: int, stream: int = 5, capture: int = NOT_CAPTURING) -> Workspace:
    return memory.workspace(CPU, stream, capture, counters, floats)


def apart(one: Workspace, other: Workspace) -> bool:
    return one.counters is not other.counters and one.scratch is not other.scratch


def test_launches_on_one_stream_share_a_workspace() -> None:
    first = ask(10, 100)
    assert not first.counters.any()
    assert ask(9, 90) is first
    assert apart(ask(9, 90, stream=6), first)
    assert ask(10, 100) is first


def test_only_the_part_that_is_too_small_is_replaced() -> None:
    first = ask(10, 100)
    grown = ask(2000, 90)
    assert grown.counters.numel() >= 2000
    assert not grown.counters.any()
    assert grown.scratch is first.scratch
    wider = ask(10, 300)
    assert wider.counters is grown.counters
    assert wider.scratch.numel() == 300
    assert ask(2000, 300) is wider


def test_a_numbered_capture_has_a_workspace_of_its_own() -> None:
    """Its launches share it, it grows, the next capture has another, and the stream's own workspace stays."""
    kept = ask(10, 100)
    captured = ask(10, 100, capture=77)
    assert apart(captured, kept)
    assert ask(10, 100, capture=77) is captured
    assert apart(ask(10, 100, stream=6, capture=77), captured), "streams of one capture run beside each other"
    assert ask(10, 200, capture=77).counters is captured.counters
    assert apart(ask(10, 100, capture=78), captured)
    assert apart(ask(10, 100, capture=77), captured), "a stale entry is not used again"
    assert ask(10, 100) is kept


def test_in_a_capture_without_a_number_nothing_is_shared_or_kept() -> None:
    first = ask(10, 100, capture=UNNUMBERED)
    assert apart(ask(10, 100, capture=UNNUMBERED), first)
    assert not memory._workspaces
    assert not memory._captured
