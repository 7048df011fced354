"""``python -m lora_kernels analyse ADAPTER [OTHER]``: what an adapter has learned, as a table, JSON and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora_kernels.analysis.analysing import analyse
from lora_kernels.analysis.report import Report
from lora_kernels.analysis.report_table import renderables
from lora_kernels.core import atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``analyse``."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a directory of PEFT or save_adapter, or a safetensors file")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="an adapter to compare it with, of any rank")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="read W from this directory or file of safetensors, or from this model of the Hub in the local cache",
    )
    parser.add_argument("--alpha", type=float, metavar="A", help="lora_alpha, for files without a config (loralib's)")
    parser.add_argument("--no-top", action="store_true", help="leave out W's own leading directions, which is faster")
    parser.add_argument(
        "--intruders", action="store_true", help="count intruder dimensions, which is slow; with --base"
    )
    parser.add_argument("--layers", action="store_true", help="show each layer, also where they are many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write pictures into this directory")


def main(args: argparse.Namespace) -> int:
    """Analyse an adapter. Return 0, or 1 with a message where that is not possible."""
    try:
        if args.intruders and args.base is None:
            raise ValueError("--intruders compares W + ΔW with W: say with --base where W is")
        report = analyse(
            args.adapter,
            args.other,
            args.base,
            lora_alpha=args.alpha,
            top=not args.no_top,
            intruders=args.intruders,
        )
        _show(report, True if args.layers else None)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            atomic.replace({args.json: f"{report.to_json()}\n".encode()})
            print(f"Written: {args.json}")
        if args.plot is not None:
            for path in report.plot(args.plot):
                print(f"Written: {path}")
    except (ValueError, OSError, ImportError, TypeError) as error:
        print(f"analyse: {error}", file=sys.stderr)
        return 1
    return 0


def _show(report: Report, every: bool | None) -> None:
    """Print the tables as wide as the terminal. Raises ImportError where rich is not installed."""
    if not sys.stdout.isatty():
        print(report.table(every))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for each in renderables(report, every, console.width):
        console.print(each)
