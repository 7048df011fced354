"""``python -m lora_kernels bench``: judge, measure, show, write."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_kernels.bench import options, own_suites, plot, report, report_suite
from lora_kernels.bench.measure import Advance, Bench
from lora_kernels.bench.record import METHOD, Record
from lora_kernels.bench.shapes import Shape
from lora_kernels.testing import documents, machine
from lora_kernels.testing.terminal import Terminal, terminal
from lora_kernels.testing.watch import STUCK, Watch, answers, first_line

add_arguments = options.add_arguments


def main(args: argparse.Namespace) -> int:
    """Return the exit status: 0 if all is well; 1 if the judge found a fault or a variant failed; 2 if the options
    cannot be served; 3 if this process can measure nothing more but another one could."""
    show = terminal()
    if fault := options.fault(args):
        show.line(f"bench: {fault}")
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.suite in options.OWN:
        return own_suites.main(args, show)
    setting, notes = options.setting(args)
    record = Record(setting, notes)
    if args.resume and args.out.exists():
        record.resume(json.loads(args.out.read_text(encoding="utf-8")))
    partial = options.is_partial(args)
    if not _measure(Bench(setting, record), args, show, imports=1 if partial else 3):
        show.line("✗ the GPU no longer answers: nothing more can be measured by this process")
        return STUCK
    document = record.document
    for table in (*report.summary(document), *report_suite.tables(document)):
        show.table(*table)
    for text in report.closing(document):
        show.line(text)
    out = args.out if args.out or partial else _default_out(document)
    if out is None:
        show.line("A partial run: not written. --out FILE writes it.")
    else:
        documents.write(document, out)
        show.line(f"Written: {out}")
        if args.plot:
            _plot(document, out.with_suffix(".png"), show)
    return _conclude(document, show)


def _conclude(document: dict[str, Any], show: Terminal) -> int:
    """Print a last line that says what the judge found. Return the exit status."""
    right = [*(entry["green"] for entry in document["gate"]), *(not call["faults"] for call in document["layer_calls"])]
    if document["failed"]:
        show.line(f"✗ {len(document['failed'])} times something could not be measured: see the notes")
    if not all(right):
        show.line(f"✗ the judge found faults in {right.count(False)} of {len(right)} checks")
    elif not document["gate"]:
        show.line("✗ none of our back-ends could be measured")
    elif not document["failed"]:
        show.line(f"✓ the judge found no fault in {len(right)} checks")
        return 0
    return 1


def _measure(bench: Bench, args: argparse.Namespace, show: Terminal, imports: int) -> bool:
    """Measure everything. Return False if the device no longer answers."""
    shapes, record, document = options.shapes(args), bench.record, bench.document
    start = datetime.datetime.fromisoformat(document["date"])  # of the first process, if this one resumes a run

    def keep() -> None:
        if args.out:
            documents.write(document, args.out)  # what is measured is kept if the process ends later

    def stuck(what: str) -> None:
        record.failed(f"no end after {args.stuck:g} s")
        keep()
        show.line(f"✗ {what}")

    show.line(report.where(document))
    show.line(METHOD)
    with Watch(args.stuck, stuck) as watch, show.progress(bench.steps(shapes)) as advance:
        record.doing = watch
        if document["roofline"] is None:
            bench.measure_rates(shapes)
        show.line(report.rates(document))
        for i, shape in enumerate(shapes):
            if record.left_out(shape):
                continue
            spent = (datetime.datetime.now(datetime.timezone.utc) - start).total_seconds()
            if args.seconds and spent > args.seconds:
                left = ", ".join(each.name for each in shapes[i:])
                document["notes"].append(f"Not measured, {args.seconds:g} s being spent: {left}")
                break
            while not record.left_out(shape):  # after a failure it is measured again, without the variant that failed
                if not _measure_one(bench, shape, advance, show, keep):
                    return False
            watch("")
            if shape.name in document["shapes"]:
                show.table(*report.shape_table(document, shape.name))
                for text in report.faults(document, shape.name):
                    show.line(text)
        advance("calls and imports", 0)
        try:
            bench.measure_calls(imports)
        except RuntimeError as error:  # what was measured before is kept
            document["notes"].append(f"Calls and imports are not measured: {first_line(error)}")
    return True


def _measure_one(bench: Bench, shape: Shape, advance: Advance, show: Terminal, keep: Callable[[], None]) -> bool:
    """Measure a shape, or put on record what failed. Return False if the device no longer answers."""
    bench.document["measuring"] = shape.name
    keep()
    try:
        bench.measure(shape, advance)
    except Exception as error:  # the failure of one variant must not cost the others
        bench.record.failed(f"{type(error).__name__}: {first_line(error)}")
        show.line(f"✗ {bench.document['notes'][-1]}")
    if not answers(bench.device):
        keep()
        return False
    del bench.document["measuring"]
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    keep()
    return True


def _default_out(document: dict[str, Any]) -> Path:
    return options.RESULTS / f"{document['date'][:10]}-{machine.kind(document['device'])}.json"


def _plot(document: dict[str, Any], path: Path, show: Terminal) -> None:
    try:
        drawn = plot.draw_all(document, path)
    except ImportError as error:
        show.line(f"No picture: {error} (pip install matplotlib)")
    else:
        show.line(f"Drawn: {', '.join(map(str, drawn))}")
