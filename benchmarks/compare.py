"""Compares the speed of two checkouts of this package, row by row, in one run.

    python -m benchmarks.compare OLD NEW [--rounds 15] [--rows NAME ...] [--json FILE]

OLD and NEW are folders that hold a built `lora_kernels/`. Each gets a process of its own, which waits while the other
one works. The two take turns round by round, so that a slow minute of the machine hits both. A row shows the median
time of each and the median over rounds of NEW's time divided by OLD's. The rows use public names only: any two versions
that have them can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS = {"vit": (512, 768, 768, 8), "gpt2": (2048, 768, 3072, 16), "llama": (1024, 2048, 2048, 16)}
"""(M, K, N, R) of the layers whose kernels dominate."""
BUDGET_S = 0.06
"""How long one row runs in one round, at least one call."""


def rows() -> dict[str, Callable[[], Run]]:
    """Every row by name, as a function that makes the operands and returns the call to time."""
    table: dict[str, Callable[[], Run]] = {}
    for name, (M, K, N, R) in LAYERS.items():
        for dtype in DTYPES:
            for p in (0.0, 0.1):
                row = f"{name} {dtype} p={p:g}"
                table[f"{row} forward"] = lambda s=(M, K, N, R, dtype, p): fused_linear(*s, backward=False)
                table[f"{row} forward + backward"] = lambda s=(M, K, N, R, dtype, p): fused_linear(*s, backward=True)
    for dtype in DTYPES:
        table[f"FusedLoRALinear 128x128 {dtype} M=1 forward"] = lambda d=dtype: fused_linear(
            1, 128, 128, 8, d, 0.0, False
        )
        table[f"FusedLoRALinear 128x128 {dtype} M=8 forward + backward"] = lambda d=dtype: fused_linear(
            8, 128, 128, 8, d, 0.0, True
        )
        for which, M, backward in (("M=1 forward", 1, False), ("M=8 forward + backward", 8, True)):
            for p in (0.0, 0.1):
                table[f"PEFT fused 128x128 {dtype} p={p:g} {which}"] = lambda s=(M, dtype, p, backward): peft_layer(*s)
    for p in (0.0, 0.1):
        table[f"DoRA 128x128 fp32 p={p:g} M=8 forward + backward"] = lambda p=p: fused_linear(
            8, 128, 128, 8, "fp32", p, True, dora=True
        )
        table[f"DoRA 768x768 fp32 p={p:g} M=512 forward + backward"] = lambda p=p: fused_linear(
            512, 768, 768, 8, "fp32", p, True, dora=True
        )
    for dtype in DTYPES:
        table[f"nf4 2048x2048 {dtype} M=1 forward"] = lambda d=dtype: quantised(1, d, False)
        table[f"nf4 2048x2048 {dtype} M=256 forward + backward"] = lambda d=dtype: quantised(256, d, True)
    return table


def fused_linear(M: int, K: int, N: int, R: int, dtype: str, p: float, backward: bool, dora: bool = False) -> Run:
    """A `FusedLoRALinear` in training."""
    import lora_kernels

    layer = lora_kernels.FusedLoRALinear(K, N, r=R, lora_dropout=p, use_dora=dora, dtype=DTYPES[dtype])
    nn.init.normal_(layer.lora_B, std=0.02)
    return step(layer, torch.randn(M, K, dtype=DTYPES[dtype]), backward)


def peft_layer(M: int, dtype: str, p: float, backward: bool) -> Run:
    """PEFT's LoRA linear after `fuse`."""
    import peft

    import lora_kernels

    base = nn.Sequential(nn.Linear(128, 128, dtype=DTYPES[dtype]))
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_dropout=p, target_modules=["0"]))
    lora_kernels.fuse(model)
    layer = model.base_model.model[0]
    return step(layer.train(), torch.randn(M, 128, dtype=DTYPES[dtype]), backward)


def quantised(M: int, dtype: str, backward: bool) -> Run:
    """A layer over a weight in nf4."""
    import lora_kernels

    linear = nn.Linear(2048, 2048, dtype=DTYPES[dtype])
    layer = lora_kernels.FusedLoRALinear.from_linear(linear, r=16, quant="nf4")
    return step(layer, torch.randn(M, 2048, dtype=DTYPES[dtype]), backward)


def step(layer: nn.Module, x: Tensor, backward: bool) -> Run:
    """One forward without gradients, or a forward with the backward of everything that is trained and of x."""
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return forward
    x.requires_grad_()
    wanted = [x, *(t for t in layer.parameters() if t.requires_grad)]
    dy = torch.randn_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def work(threads: int) -> None:
    """Answers each line, the name of a row, with the median seconds of one call. Runs in the process of a checkout."""
    torch.set_num_threads(threads)
    made: dict[str, Run] = {}
    table = rows()
    for line in sys.stdin:
        name = line.strip()
        if name not in made:
            torch.manual_seed(0)
            made = {name: table[name]()}
            for _ in range(5):
                made[name]()
        run, seconds, end = made[name], [], time.perf_counter() + BUDGET_S
        while not seconds or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        print(statistics.median(seconds), flush=True)


class Checkout:
    """A process that times rows with the package in one folder."""

    def __init__(self, folder: Path, threads: int) -> None:
        if not (folder / "lora_kernels").is_dir():
            raise SystemExit(f"{folder} holds no folder lora_kernels: name the root of a checkout")
        command = [sys.executable, str(Path(__file__).resolve()), "--work", str(threads)]
        environment = os.environ | {"PYTHONPATH": str(folder.resolve())}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def time(self, row: str) -> float:
        """Seconds of one call of the row."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(row, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process that timed {row!r} ended with status {self.process.wait()}")
        return float(answer)


def main() -> None:
    """Runs the comparison, prints a line for each row, and writes the figures as JSON."""
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
    for row in (row for row in rows() if any(part in row for part in args.rows)):
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
    if "--work" in sys.argv:
        work(int(sys.argv[-1]))
    else:
        main()
