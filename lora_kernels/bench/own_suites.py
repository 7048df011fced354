"""The suites of the bench that have cells of their own instead of the shapes of a linear layer: how they are run,
shown and written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_kernels.bench import options
from lora_kernels.bench.kinds import cells as kinds_cells
from lora_kernels.bench.kinds import measure as kinds_measure
from lora_kernels.bench.kinds import plot as kinds_plot
from lora_kernels.bench.kinds import report as kinds_report
from lora_kernels.bench.many import cells as many_cells
from lora_kernels.bench.many import measure as many_measure
from lora_kernels.bench.many import plot as many_plot
from lora_kernels.bench.many import report as many_report
from lora_kernels.bench.record import METHOD, Setting
from lora_kernels.bench.report import Document, Table, where
from lora_kernels.testing import documents, machine
from lora_kernels.testing.terminal import Terminal


class Suite(NamedTuple):
    """A suite with cells of its own."""

    cells: Callable[[argparse.Namespace], list[Any]]
    begin: Callable[[Setting], Document]
    measure: Callable[[Document, list[Any], Setting, Callable[[str, int], None]], None]
    tables: Callable[[Document], Iterator[Table]]
    closing: Callable[[Document], Iterator[str]]
    draw: Callable[[Document, Path], None]


SUITES = {
    options.MANY: Suite(
        lambda args: many_cells.cells(),
        many_measure.begin,
        many_measure.measure,
        many_report.tables,
        many_report.closing,
        many_plot.draw,
    ),
    options.KINDS: Suite(
        lambda args: kinds_cells.cells(args.kinds or kinds_cells.KINDS),
        kinds_measure.begin,
        kinds_measure.measure,
        kinds_report.tables,
        kinds_report.closing,
        kinds_plot.draw,
    ),
}


def main(args: argparse.Namespace, show: Terminal) -> int:
    """Return the exit status: 0 if all is well, 1 if the judge found a fault."""
    suite, (setting, _) = SUITES[args.suite], options.setting(args)
    document, wanted = suite.begin(setting), suite.cells(args)
    show.line(where(document))
    show.line(METHOD)
    with show.progress(setting.rounds * len(wanted)) as advance:
        suite.measure(document, wanted, setting, advance)
    for table in suite.tables(document):
        show.table(*table)
    for text in suite.closing(document):
        show.line(text)
    name = f"{document['date'][:10]}-{machine.kind(document['device'])}.json"
    out = args.out or (None if options.is_partial(args) else options.RESULTS / args.suite / name)
    if out is None:
        show.line("A partial run: not written. --out FILE writes it.")
    else:
        documents.write(document, out)
        show.line(f"Written: {out}")
        if args.plot:
            _plot(suite, document, out.with_suffix(".png"), show)
    green = [check["green"] for check in document["gate"]]
    if not all(green):
        show.line(f"✗ the judge found faults in {green.count(False)} of {len(green)} checks")
        return 1
    show.line(f"✓ the judge found no fault in {len(green)} checks")
    return 0


def _plot(suite: Suite, document: Document, path: Path, show: Terminal) -> None:
    try:
        suite.draw(document, path)
    except ImportError as error:
        show.line(f"No picture: {error} (pip install matplotlib)")
    else:
        show.line(f"Drawn: {path}")
