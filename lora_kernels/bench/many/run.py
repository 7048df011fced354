"""``python -m lora_kernels bench --suite many``: judge, measure, show, write."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_kernels.bench import options
from lora_kernels.bench.many import measure, plot, report
from lora_kernels.bench.many.cells import cells
from lora_kernels.bench.record import METHOD
from lora_kernels.bench.report import Document, where
from lora_kernels.testing import documents, machine
from lora_kernels.testing.terminal import Terminal

RESULTS = options.RESULTS / "many"


def main(args: argparse.Namespace, show: Terminal) -> int:
    """Return the exit status: 0 if all is well, 1 if the judge found a fault."""
    setting, _ = options.setting(args)
    document, wanted = measure.begin(setting), cells()
    show.line(where(document))
    show.line(METHOD)
    with show.progress(setting.rounds * len(wanted)) as advance:
        measure.measure(document, wanted, setting, advance)
    for table in report.tables(document):
        show.table(*table)
    for text in report.closing(document):
        show.line(text)
    partial = options.is_partial(args)
    name = f"{document['date'][:10]}-{machine.kind(document['device'])}.json"
    out = args.out or (None if partial else RESULTS / name)
    if out is None:
        show.line("A partial run: not written. --out FILE writes it.")
    else:
        documents.write(document, out)
        show.line(f"Written: {out}")
        if args.plot:
            _plot(document, out.with_suffix(".png"), show)
    green = [check["green"] for check in document["gate"]]
    if not all(green):
        show.line(f"✗ the judge found faults in {green.count(False)} of {len(green)} checks")
        return 1
    show.line(f"✓ the judge found no fault in {len(green)} checks")
    return 0


def _plot(document: Document, path: Path, show: Terminal) -> None:
    try:
        plot.draw(document, path)
    except ImportError as error:
        show.line(f"No picture: {error} (pip install matplotlib)")
    else:
        show.line(f"Drawn: {path}")
