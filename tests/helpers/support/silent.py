"""A stand-in for the terminal that counts the steps of a progress bar and prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Silent:
    """`left` is the number of steps that were announced and have not been made."""

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str, int], None]]:
        """Yield the function that takes a step."""
        self.left = total

        def advance(what: str, steps: int) -> None:
            self.left -= steps

        yield advance
