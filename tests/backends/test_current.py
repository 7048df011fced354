"""The device of a call is made the current one, where it is not."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.backends.current import current


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that torch is told to make current, while the current one is the second."""
    told: list[torch.device] = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            told.append(self.device)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", Device)
    return told


def test_the_current_device_is_left_alone(switches: list[torch.device]) -> None:
    with current(torch.device("cuda", 1)), current(torch.device("cuda")):
        pass
    assert switches == []


def test_another_device_is_made_current(switches: list[torch.device]) -> None:
    with current(torch.device("cuda", 0)):
        assert switches == [torch.device("cuda", 0)]
