"""The table of jobs that people look at, made with rich."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lora_kernels.jobs.job import Job
from lora_kernels.jobs.runner import Progress

if TYPE_CHECKING:
    from rich.table import Table


def of(lines: Iterable[tuple[Job, int, Progress]]) -> Table:
    """Return a table with a line for each job: (the job, its largest rank, where it stands)."""
    table, name = _rich("rich.table").Table("job"), _rich("rich.text").Text  # a name may look like rich's markup
    for column in ("step", "loss", "grad norm", "lr", "rank", "samples"):
        table.add_column(column, justify="right")
    table.add_column("")
    for job, rank, now in lines:
        step = f"{now.step}" if job.steps is None else f"{now.step}/{job.steps}"
        told = now.phase if not now.reason else f"{now.phase}: {now.reason}"
        numbers = [_number(value) for value in (now.loss, now.grad_norm, now.lr)]
        table.add_row(name(job.name), step, *numbers, str(rank), str(now.samples), told)
    return table


@contextlib.contextmanager
def live(make: Callable[[], Table]) -> Iterator[None]:
    """Print the table that `make` returns, again and again until the context ends."""
    with _rich("rich.live").Live(get_renderable=make, refresh_per_second=4):
        yield


def _rich(module: str) -> Any:
    """Return a module of rich. Raises ImportError, which says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("the table of jobs needs rich: pip install rich") from error


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
