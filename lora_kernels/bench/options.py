"""The options of ``python -m lora_kernels bench``: how they are read, and what they select."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lora_kernels.backends import dispatch
from lora_kernels.bench.kinds import cells as kinds
from lora_kernels.bench.record import Setting
from lora_kernels.bench.shapes import DEFAULT, NAMED, SUITES, TARGETED, Shape
from lora_kernels.bench.variants import baselines, more_baselines
from lora_kernels.testing.watch import STUCK

ROUNDS, QUICK_ROUNDS = 15, 4
RESULTS = Path("benchmarks/results")
MANY, KINDS = "many", "kinds"
"""The suites that have cells of their own instead of shapes: many adapters in one batch, and layers that are no plain
linear ones."""
OWN = (MANY, KINDS)
_OWN_DEVICE = "cpu"
"""The type of the device that they are for."""
_NOT_OF_OWN = ("without", "peers", "peer", "seconds", "stuck", "resume")
"""Options that the suite `many` does not have."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench``."""
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    parser.add_argument(
        "--shapes", nargs="+", choices=NAMED, metavar="NAME", help="shapes by name; an unknown name prints the list"
    )
    parser.add_argument(
        "--suite",
        choices=[*SUITES, *OWN],
        help=f"a named set of shapes, with its own tables and pictures; {MANY}: many adapters in one batch; {KINDS}: "
        "experts, embeddings, convolutions and others",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=kinds.KINDS,
        metavar="KIND",
        help=f"measure only these kinds of layers, with --suite {KINDS}: {', '.join(kinds.KINDS)}",
    )
    parser.add_argument("--backend", choices=dispatch.BACKENDS, help="measure this one of our back-ends only")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="do not measure this one")
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
    parser.add_argument("--seconds", type=float, metavar="S", help="start no further shape after S seconds")
    parser.add_argument(
        "--stuck",
        type=float,
        metavar="S",
        help=f"end with exit status {STUCK} if a variant takes longer than S seconds for one check or one sample "
        "(default: wait); --resume then goes on without it",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run that wrote --out FILE, if it exists")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads on the CPU (default: torch's choice)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the JSON to write (default: {RESULTS}/<date>-<machine>.json for a whole run; a run of only some shapes, "
        "rounds or back-ends is written only if this option names a file)",
    )
    parser.add_argument("--plot", action="store_true", help="draw a PNG beside the JSON")


def fault(args: argparse.Namespace) -> str | None:
    """Return what is wrong with the options, or None."""
    if args.rounds is not None and args.rounds < 1:
        return f"--rounds must be at least 1, got {args.rounds}"
    if args.threads is not None and args.threads < 1:
        return f"--threads must be at least 1, got {args.threads}"
    if args.plot and not args.out and is_partial(args):
        return "--plot draws beside the JSON, and a partial run writes one only if --out FILE names it"
    if args.resume and not args.out:
        return "--resume goes on with the file that --out FILE names"
    if args.suite and args.shapes:
        return "--suite and --shapes both name what to measure: give one of them"
    for text in args.peer:
        if not all(text.partition("=")):
            return f"--peer {text}: expected NAME=PATH"
    try:
        named = torch.device(args.device or "cpu")
    except RuntimeError as error:
        return f"--device {args.device}: {str(error).splitlines()[0]}"
    if named.type not in DEFAULT:
        return f"--device {args.device}: the bench can time {' and '.join(DEFAULT)}"
    if named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count():
        return f"--device {args.device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
    kind = device(args).type
    served = (_OWN_DEVICE,) if args.suite in OWN else tuple(SUITES.get(args.suite, (kind,)))
    if kind not in served:
        return f"--suite {args.suite} is for {', '.join(served)}, and the device is {kind}"
    given = [f"--{name}" for name in _NOT_OF_OWN if getattr(args, name)]
    if args.suite == KINDS and args.backend:
        given.append("--backend")
    if args.suite in OWN and given:
        return f"--suite {args.suite} does not take {', '.join(given)}"
    if args.kinds and args.suite != KINDS:
        return f"--kinds goes with --suite {KINDS}"
    return None


def device(args: argparse.Namespace) -> torch.device:
    """Return the device to measure on: the one named, else a GPU if there is one."""
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def is_partial(args: argparse.Namespace) -> bool:
    """Return whether the run measures only a part of everything, or another set of shapes. A partial run is written
    only if --out names a file. A suite with cells of its own is whole by itself."""
    if args.suite in OWN:
        return any((args.quick, args.rounds, args.backend, args.kinds))
    narrowed = (args.quick, args.shapes, args.suite, args.rounds, args.backend, args.without, args.seconds, args.peer)
    return any(narrowed)


def setting(args: argparse.Namespace) -> tuple[Setting, list[str]]:
    """Return the setting that the options ask for, and notes on variants that cannot be measured."""
    found, notes = baselines()
    sources = [(name, Path(path)) for name, _, path in (text.partition("=") for text in args.peer)]
    more, more_notes = more_baselines(sources)
    on = device(args)
    if args.peers == "basic" or (args.peers is None and on.type != "cuda"):
        more = [variant for variant in more if variant.name in dict(sources)]
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    chosen = Setting(on, rounds, _command(args), [*found, *more], args.backend, args.without, args.suite)
    return chosen, [*notes, *more_notes]


def shapes(args: argparse.Namespace) -> list[Shape]:
    """Return the shapes to measure."""
    kind = device(args).type
    if args.shapes:
        return [NAMED[name] for name in args.shapes]
    if args.suite:
        return list(SUITES[args.suite][kind])
    return list(TARGETED if args.quick else DEFAULT[kind])


def _command(args: argparse.Namespace) -> str:
    """Return the command, without the paths that it reads or writes."""
    words = ["python -m lora_kernels bench"]
    for name in (
        "device",
        "suite",
        "kinds",
        "shapes",
        "backend",
        "without",
        "peers",
        "quick",
        "rounds",
        "seconds",
        "threads",
    ):
        value = getattr(args, name)
        if value:
            words += [f"--{name}", *(value if isinstance(value, list) else [] if value is True else [str(value)])]
    words += [f"--peer {text.partition('=')[0]}=..." for text in args.peer]
    return " ".join(words)
