"""What all tests of jobs share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_warning_of_slow_masks() -> Iterator[None]:
    """In fp64, which only the eager back-end serves, jobs can be compared closely."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no kernel is chosen")
        yield
