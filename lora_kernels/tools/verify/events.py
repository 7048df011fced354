"""What a process of `verify` tells the one that started it: a line of JSON for each event, in a file.

A line is written before every wait that it announces, so that the last one names what hangs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SLOW, RUN = "slow", "run"
"""The limits of a step. `SLOW`: it compiles or prepares, which may take minutes. `RUN`: it waits for a kernel that was
launched."""


class Teller:
    """Writes events to a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, **event: Any) -> None:
        """Write one event."""
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def doing(self, what: str, limit: str, **more: Any) -> None:
        """Tell which step begins, and by which of the limits it must end."""
        self(doing=what, limit=limit, **more)


class Listener:
    """Reads the events of another process as they come."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open(encoding="utf-8")
        self._rest = ""

    def read(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        return [json.loads(line) for line in lines if line]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
