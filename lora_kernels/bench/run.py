"""``python -m lora_kernels bench``: gate, measure, show, write."""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_kernels.backends import dispatch
from lora_kernels.bench import plot, report, report_suite
from lora_kernels.bench.measure import METHOD, Advance, Bench
from lora_kernels.bench.shapes import DEFAULT, NAMED, SUITES, TARGETED, Shape
from lora_kernels.bench.variants import baselines, more_baselines
from lora_kernels.testing import machine
from lora_kernels.testing.terminal import Terminal, terminal
from lora_kernels.testing.watch import STUCK, Watch, answers, first_line

ROUNDS, QUICK_ROUNDS = 15, 4
RESULTS = Path("benchmarks/results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench``."""
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument(
        "--shapes", nargs="+", choices=NAMED, metavar="NAME", help="by name; a name there is none of lists them all"
    )
    parser.add_argument("--suite", choices=SUITES, help="a named set of shapes, with tables and pictures of its own")
    parser.add_argument("--backend", choices=dispatch.BACKENDS, help="of ours, measure this one only")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="of ours, leave this one out")
    parser.add_argument(
        "--peers",
        choices=("basic", "all"),
        help="all: also PEFT with adapters in the other dtype and, on some shapes, compiled (default: all on a GPU)",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another project's layer from its sources: lorafusion=CHECKOUT, unsloth=CHECKOUT, or any name and a "
        "Python file with lora_linear(x, w, a, b, *, bias, scale, p)",
    )
    parser.add_argument("--quick", action="store_true", help="the shapes that have a target, in few rounds")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"default: {ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--seconds", type=float, metavar="S", help="begin no further shape after this long")
    parser.add_argument(
        "--stuck",
        type=float,
        metavar="S",
        help=f"end with exit status {STUCK} where a variant takes longer for one check or one sample (default: "
        "wait); --resume goes on without it",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where the run that wrote --out FILE ended, if there is one"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch's on the CPU (default: torch's own choice)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the JSON to write (default: {RESULTS}/<date>-<machine>.json for a whole run; one of some shapes, rounds "
        "or back-ends is written only where this says)",
    )
    parser.add_argument("--plot", action="store_true", help="draw a PNG beside the JSON")


def main(args: argparse.Namespace) -> int:
    """Exit status: 0; 1 where a gate is red or a variant failed; 2 where nothing can be measured as asked; 3 where this
    process can measure nothing more, but another one could."""
    show = terminal()
    fault = _fault(args)
    if fault:
        show.line(f"bench: {fault}")
        return 2
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.threads:
        torch.set_num_threads(args.threads)
    partial = _is_partial(args)
    found, notes = baselines()
    sources = [(name, Path(path)) for name, _, path in (text.partition("=") for text in args.peer)]
    more, more_notes = more_baselines(sources)
    if args.peers == "basic" or (args.peers is None and device.type != "cuda"):
        more = [variant for variant in more if variant.name in dict(sources)]
    bench = Bench(
        device,
        args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS),
        _command(args),
        ([*found, *more], [*notes, *more_notes]),
        args.backend,
        args.without,
        args.suite,
    )
    if args.resume and args.out.exists():
        bench.resume(json.loads(args.out.read_text(encoding="utf-8")))
    document = bench.document
    if not _measure(bench, args, _shapes(args, device), show, imports=1 if partial else 3):
        show.line("✗ the GPU no longer answers: nothing more can be measured by this process")
        return STUCK
    for table in (*report.summary(document), *report_suite.tables(document)):
        show.table(*table)
    for text in report.closing(document):
        show.line(text)
    out = args.out if args.out or partial else _default_out(document)
    if out is None:
        show.line("A partial run: not written. --out FILE writes it.")
    else:
        write(document, out)
        show.line(f"Written: {out}")
        if args.plot:
            _plot(document, out.with_suffix(".png"), show)
    gates = [*(entry["green"] for entry in document["gate"]), *(not call["faults"] for call in document["layer_calls"])]
    if document["failed"]:
        show.line(f"✗ {len(document['failed'])} times something could not be measured: see the notes")
    if not all(gates) or not document["gate"] or document["failed"]:
        show.line(
            f"✗ {gates.count(False)} of {len(gates)} gates red"
            if not all(gates)
            else "✗ none of our back-ends could be measured"
        )
        return 1
    show.line(f"✓ all {len(gates)} gates green")
    return 0


def _measure(bench: Bench, args: argparse.Namespace, shapes: list[Shape], show: Terminal, imports: int) -> bool:
    """False where the device no longer answers."""
    document = bench.document
    start = datetime.datetime.fromisoformat(document["date"])  # of the first process, where this is not it

    def keep() -> None:
        if args.out:
            write(document, args.out)  # what is measured stays, whatever comes

    def stuck(what: str) -> None:
        bench.failed(f"no end after {args.stuck:g} s")
        keep()
        show.line(f"✗ {what}")

    show.line(report.where(document))
    show.line(METHOD)
    with Watch(args.stuck, stuck) as watch, show.progress(bench.steps(shapes)) as advance:
        bench.doing = watch
        if document["roofline"] is None:
            bench.measure_rates(shapes)
        show.line(report.rates(document))
        for i, shape in enumerate(shapes):
            if bench.left_out(shape):
                continue
            spent = (datetime.datetime.now(datetime.timezone.utc) - start).total_seconds()
            if args.seconds and spent > args.seconds:
                left = ", ".join(each.name for each in shapes[i:])
                document["notes"].append(f"Not measured, {args.seconds:g} s being spent: {left}")
                break
            while not bench.left_out(shape):  # again without what failed, if anything does
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
        except RuntimeError as error:  # what was measured before is not lost by it
            document["notes"].append(f"Calls and imports are not measured: {first_line(error)}")
    return True


def _measure_one(bench: Bench, shape: Shape, advance: Advance, show: Terminal, keep: Callable[[], None]) -> bool:
    """A shape, or on record what failed. False where the device no longer answers."""
    bench.document["measuring"] = shape.name
    keep()
    try:
        bench.measure(shape, advance)
    except Exception as error:  # one variant's failure is no other's
        bench.failed(f"{type(error).__name__}: {first_line(error)}")
        show.line(f"✗ {bench.document['notes'][-1]}")
    if not answers(bench.device):
        keep()
        return False
    del bench.document["measuring"]
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    keep()
    return True


def _is_partial(args: argparse.Namespace) -> bool:
    """Whether less than everything, or something else, is measured: only a whole run is written unasked."""
    return bool(
        args.quick
        or args.shapes
        or args.suite
        or args.rounds
        or args.backend
        or args.without
        or args.seconds
        or args.peer
    )


def _fault(args: argparse.Namespace) -> str | None:
    """What is wrong with the options."""
    if args.rounds is not None and args.rounds < 1:
        return f"--rounds must be at least 1, got {args.rounds}"
    if args.threads is not None and args.threads < 1:
        return f"--threads must be at least 1, got {args.threads}"
    if args.plot and not args.out and _is_partial(args):
        return "--plot draws beside the JSON, and a partial run writes one only where --out FILE says"
    if args.resume and not args.out:
        return "--resume goes on with the file that --out FILE names"
    if args.suite and args.shapes:
        return "--suite and --shapes both name what to measure: give one of them"
    for text in args.peer:
        if not all(text.partition("=")):
            return f"--peer {text}: expected NAME=PATH"
    try:
        device = torch.device(args.device or "cpu")
    except RuntimeError as error:
        return f"--device {args.device}: {str(error).splitlines()[0]}"
    if device.type not in DEFAULT:
        return f"--device {args.device}: the bench can time {' and '.join(DEFAULT)}"
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return f"--device {args.device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
    kind = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if args.suite and kind not in SUITES[args.suite]:
        return f"--suite {args.suite} is for {', '.join(SUITES[args.suite])}, and the device is {kind}"
    return None


def _shapes(args: argparse.Namespace, device: torch.device) -> list[Shape]:
    if args.shapes:
        return [NAMED[name] for name in args.shapes]
    if args.suite:
        return list(SUITES[args.suite][device.type])
    return list(TARGETED if args.quick else DEFAULT[device.type])


def _command(args: argparse.Namespace) -> str:
    """The command, without the places it writes to."""
    words = ["python -m lora_kernels bench"]
    for name in ("device", "suite", "shapes", "backend", "without", "peers", "quick", "rounds", "seconds", "threads"):
        value = getattr(args, name)
        if value:
            words += [f"--{name}", *(value if isinstance(value, list) else [] if value is True else [str(value)])]
    words += [f"--peer {text.partition('=')[0]}=..." for text in args.peer]
    return " ".join(words)


def _default_out(document: dict[str, Any]) -> Path:
    return RESULTS / f"{document['date'][:10]}-{machine.kind(document['device'])}.json"


def write(document: dict[str, Any], path: Path) -> None:
    """Whole or not at all: beside its place first, then moved into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _plot(document: dict[str, Any], path: Path, show: Terminal) -> None:
    try:
        drawn = plot.draw_all(document, path)
    except ImportError as error:
        show.line(f"No picture: {error} (pip install matplotlib)")
    else:
        show.line(f"Drawn: {', '.join(map(str, drawn))}")
