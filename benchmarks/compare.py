"""Compare the speed of two checkouts of this package, row by row, in one run.

    python -m benchmarks.compare OLD NEW [--rounds 15] [--rows NAME ...] [--json FILE]

OLD and NEW are folders that hold a built `lora_kernels/`. Each gets a process of its own, which waits while the other
one works. The two take turns round by round, so that a slow minute of the machine hits both. A row shows the median
time of each, the median over rounds of NEW's time / OLD's, and the quartiles of that ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import compare_rows


class Checkout:
    """A process that times rows with the package in one folder."""

    def __init__(self, folder: Path, threads: int) -> None:
        if not (folder / "lora_kernels").is_dir():
            raise SystemExit(f"{folder} holds no folder lora_kernels: name the root of a checkout")
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


def main() -> None:
    """Print a line for each row, and write the figures as JSON if a file is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path, help="the root of the checkout to compare with")
    parser.add_argument("new", type=Path, help="the root of the checkout to judge")
    parser.add_argument("--rounds", type=int, default=15, help="how often the two take turns on each row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads in each process")
    parser.add_argument("--rows", nargs="*", default=[""], help="parts of row names; all rows by default")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    args = parser.parse_args()
    old, new = (Checkout(folder, args.threads) for folder in (args.old, args.new))
    figures: dict[str, dict[str, float]] = {}
    for row in (row for row in compare_rows.rows() if any(part in row for part in args.rows)):
        pairs = [(old.time(row), new.time(row)) for _ in range(args.rounds)]
        ratios = sorted(b / a for a, b in pairs)
        figures[row] = {
            "old_s": statistics.median(a for a, _ in pairs),
            "new_s": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[len(ratios) // 4],
            "ratio_high": ratios[(3 * len(ratios)) // 4],
        }
        f = figures[row]
        print(
            f"{row:55} {f['old_s'] * 1e6:10.1f} µs {f['new_s'] * 1e6:10.1f} µs   "
            f"×{f['ratio']:.3f}  ({f['ratio_low']:.2f} to {f['ratio_high']:.2f})",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
