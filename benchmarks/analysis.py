"""The time that `analyse` takes on an adapter of the size of a 7B model's: 224 layers of 4096×4096, r 16.

    python -m benchmarks.analysis [--layers N] [--size N] [--rank R] [--out FILE]

The weights in bf16 are four tensors that the layers share. Singular values are planted, and the numbers are reported
only if `analyse` finds them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.analysis import analyse
from lora_kernels.analysis.report import Report
from lora_kernels.testing import documents
from lora_kernels.testing.terminal import terminal

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"without W": 10.0, "with W": 60.0}
"""Seconds that 224 layers of 4096×4096 with r 16 may take on two cores."""
_WEIGHTS = 4


def adapter_of(names: list[str], size: int, values: Tensor) -> dict[str, Tensor]:
    """Return a state of loralib in which every ΔW, at lora_alpha = r, has these singular values."""
    r = len(values)
    factors = [torch.linalg.qr(torch.randn(size, r))[0] for _ in range(8)]
    state = {}
    for i, name in enumerate(names):
        mix = torch.linalg.qr(torch.randn(r, r))[0]
        state[f"{name}.lora_A"] = mix @ (values.sqrt()[:, None] * factors[i % 8].T)
        state[f"{name}.lora_B"] = (factors[(i + 3) % 8] * values.sqrt()) @ mix.T
    return state


def base_of(names: list[str], size: int) -> nn.Module:
    """Return a model with a linear layer of each name. Singular values of its weights fall as those of real ones."""
    falling = torch.linspace(0, 3, size).neg().exp()
    weights = [(torch.randn(size, size) * falling).bfloat16() for _ in range(_WEIGHTS)]
    model = nn.Module()
    for i, name in enumerate(names):
        inner: Any = model
        *parents, last = name.split(".")
        for parent in parents:
            if parent not in inner._modules:
                inner.add_module(parent, nn.Module())
            inner = inner._modules[parent]
        linear = nn.Linear(size, size, bias=False, device="meta")
        linear.weight = nn.Parameter(weights[i % _WEIGHTS], requires_grad=False)
        inner.add_module(last, linear)
    return model


def fault(report: Report, values: Tensor) -> str:
    """Return what is wrong with a report, or ""."""
    want = values.double()
    for layer in report:
        error = ((torch.tensor(layer.singular_values, dtype=torch.float64) - want) / want).abs().max().item()
        if error > 1e-5:
            return f"{layer.name}: a singular value is off by {error:.1e}"
    return ""


def main(argv: list[str] | None = None) -> int:
    """Measure and print. Return 0, or 1 if a number is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=224, help="the number of layers")
    parser.add_argument("--size", type=int, default=4096, help="N and K")
    parser.add_argument("--rank", type=int, default=16, help="r")
    parser.add_argument("--out", type=Path, help="write the measurement as JSON to this file")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    names = [f"model.layers.{i // len(MODULES)}.{MODULES[i % len(MODULES)]}" for i in range(args.layers)]
    values = torch.logspace(0, -1, args.rank)
    state, base, show = adapter_of(names, args.size, values), base_of(names, args.size), terminal()
    document = documents.begin(torch.device("cpu"), ("torch",), f"python -m benchmarks.analysis --layers {args.layers}")
    document |= {"layers": args.layers, "size": args.size, "rank": args.rank, "seconds": {}}
    rows = []
    for what, more in {
        "without W": {"base": False},
        "with W, without its own top": {"base": base, "top": False},
        "with W": {"base": base},
    }.items():
        start = time.perf_counter()
        report = analyse(state, lora_alpha=args.rank, **more)
        seconds = time.perf_counter() - start
        if wrong := fault(report, values):
            show.line(f"✗ {what}: {wrong}")
            return 1
        document["seconds"][what] = seconds
        target = f"at most {TARGETS[what]:.0f} s" if what in TARGETS else ""
        rows.append([what, f"{seconds:.2f} s", f"{1e3 * seconds / args.layers:.1f} ms", target])
    title = f"analyse: {args.layers} layers of {args.size}×{args.size}, r {args.rank}"
    show.table(title, ("", "time", "a layer", "target for 224 layers of 4096×4096, r 16"), rows)
    if args.out:
        documents.write(document, args.out)
        show.line(f"Written: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
