"""Compare the speed of two checkouts of this package, row by row, in one run.

    python -m benchmarks.compare OLD NEW [--pairs 5] [--rounds 9] [--rows NAME ...] [--json FILE]

OLD and NEW are folders that hold a built `lora_kernels/`. In every pair of processes each has one, which waits while
the other one works. The two take turns round by round, so that a slow minute of the machine hits both.

A process keeps its addresses and its choice of a GEMM for life. The same code may differ by 10 % from one process to
another through these, so every row is timed in several pairs of processes. A row shows the median time of each
checkout, the median over pairs of NEW's time / OLD's, and the lowest and highest of that ratio. Comparing a checkout
with itself tells how much of a difference is chance.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import compare_rows
from lora_kernels.testing import documents
from lora_kernels.testing.terminal import terminal


class Timer:
    """A process that times rows with the package in one folder."""

    def __init__(self, folder: Path, threads: int) -> None:
        package = folder / "lora_kernels"
        if not package.is_dir():
            raise SystemExit(f"{folder} holds no folder lora_kernels: name the root of a checkout")
        if not any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
            raise SystemExit(f"{package} has no native code: run `python setup.py build_ext --inplace` in {folder}")
        command = [sys.executable, str(Path(compare_rows.__file__).resolve()), str(threads)]
        environment = os.environ | {"PYTHONPATH": str(folder.resolve())}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def time(self, row: str) -> float:
        """Return the seconds of one call of the row."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(row, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process that timed {row!r} ended with status {self.process.wait()}")
        return float(answer)

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Pair(NamedTuple):
    """The times of a row in one pair of processes."""

    old_s: float
    """The median seconds of OLD."""
    new_s: float
    """The median seconds of NEW."""
    ratio: float
    """The median over rounds of NEW's time / OLD's."""


def time_pair(folders: tuple[Path, Path], threads: int, rows: list[str], rounds: int) -> Iterator[tuple[str, Pair]]:
    """Yield each row with its times, from two new processes."""
    old, new = (Timer(folder, threads) for folder in folders)
    for row in rows:
        times = [(old.time(row), new.time(row)) for _ in range(rounds)]
        old_s, new_s = (statistics.median(column) for column in zip(*times, strict=True))
        yield row, Pair(old_s, new_s, statistics.median(b / a for a, b in times))
    old.end()
    new.end()


def main(argv: list[str] | None = None) -> int:
    """Print a table of the rows, and write the figures as JSON if a file is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path, help="the root of the checkout to compare with")
    parser.add_argument("new", type=Path, help="the root of the checkout to judge")
    parser.add_argument("--pairs", type=int, default=5, help="how many pairs of processes time each row")
    parser.add_argument("--rounds", type=int, default=9, help="how often the two of a pair take turns on each row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads in each process")
    parser.add_argument("--rows", nargs="*", default=[""], help="parts of row names; all rows by default")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    args = parser.parse_args(argv)
    rows = [row for row in compare_rows.rows() if any(part in row for part in args.rows)]
    if not rows:
        names = ", ".join(compare_rows.rows())
        raise SystemExit(f"no row has {' or '.join(map(repr, args.rows))} in its name: {names}")
    taken: dict[str, list[Pair]] = {row: [] for row in rows}
    show = terminal()
    with show.progress(args.pairs * len(rows)) as advance:
        for number in range(args.pairs):
            for row, pair in time_pair((args.old, args.new), args.threads, rows, args.rounds):
                taken[row].append(pair)
                advance(f"pair {number + 1} of {args.pairs}", 1)
    figures = {row: _figures(pairs) for row, pairs in taken.items()}
    header = ("row", "old", "new", "new / old", "lowest and highest pair")
    cells = [
        (
            row,
            f"{1e6 * f['old_s']:.1f} µs",
            f"{1e6 * f['new_s']:.1f} µs",
            f"×{f['ratio']:.3f}",
            f"{f['ratio_lowest']:.2f} to {f['ratio_highest']:.2f}",
        )
        for row, f in figures.items()
    ]
    show.table(f"{args.new} beside {args.old}, {args.pairs} pairs of processes", header, cells)
    if args.json:
        documents.write(figures, args.json)
    return 0


def _figures(pairs: list[Pair]) -> dict[str, float]:
    ratios = [pair.ratio for pair in pairs]
    return {
        "old_s": statistics.median(pair.old_s for pair in pairs),
        "new_s": statistics.median(pair.new_s for pair in pairs),
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }


if __name__ == "__main__":
    sys.exit(main())
