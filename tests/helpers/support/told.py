"""The events that a job of `verify` tells, where the job runs in the process of a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_kernels.tools.verify.events import Listener, Teller


def told(folder: Path, job: Callable[[Teller], None]) -> list[dict[str, Any]]:
    """Run a job and return its events."""
    path = folder / "events"
    listener = Listener(path)
    try:
        job(Teller(path))
        return listener.read()
    finally:
        listener.close()
        path.unlink()


def notes(events: list[dict[str, Any]]) -> str:
    """Return all notes among events as one text."""
    return "\n".join(event["note"] for event in events if "note" in event)
