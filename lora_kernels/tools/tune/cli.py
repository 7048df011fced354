"""``python -m lora_kernels tune``: measure plans of a back-end on this GPU, and keep the fastest.

What is measured is in tune_triton.py and tune_cuda.py, how in tune_measure.py. Nothing else in the package searches.
"""

from __future__ import annotations

import argparse
import re
from contextlib import suppress

import torch

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Call
from lora_kernels.plans import store as tuned
from lora_kernels.quant import tables as quant_tables
from lora_kernels.quant.weight import FORMATS
from lora_kernels.testing.names import SHORT
from lora_kernels.testing.terminal import terminal
from lora_kernels.testing.watch import STUCK, first_line
from lora_kernels.tools.tune.candidates import Size
from lora_kernels.tools.tune.measure import Setting, Subject, Tuner

DEFAULT = (
    Size(8192, 4096, 4096, 16),
    Size(8192, 4096, 14336, 16),
    Size(8192, 14336, 4096, 16),
    Size(16, 4096, 4096, 16),
)
"""Projections of Llama-3.1-8B: q, up and down in training, q in decoding."""


def size(text: str) -> Size:
    """ "8192x4096x14336:16" as M, K, N and r. Raises argparse.ArgumentTypeError where it is not that."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+)", text)
    result = Size(*map(int, match.groups())) if match else None
    if result is None or not all(result):
        raise argparse.ArgumentTypeError(f"{text!r}: expected MxKxN:r, such as {DEFAULT[0]}")
    if result.K % 8 or result.N % 8:
        raise argparse.ArgumentTypeError(
            f"{text!r}: K and N must be multiples of 8; operands of other sizes are served by the tables alone"
        )
    return result


def probability(text: str) -> float:
    """A p of dropout. Raises argparse.ArgumentTypeError outside [0, 1)."""
    with suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected 0 <= p < 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tune``."""
    defaults = " ".join(map(str, DEFAULT))
    parser.add_argument(
        "--shapes", nargs="+", type=size, default=DEFAULT, metavar="MxKxN:r", help=f"default: {defaults}"
    )
    # fp32's speed depends on torch.get_float32_matmul_precision(), which no plan knows of.
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="of x and w (default: bf16)")
    parser.add_argument(
        "--fp32-adapters", action="store_true", help="a and b in fp32 (PEFT's default), not in x's dtype"
    )
    parser.add_argument(
        "--backend",
        choices=("triton", "cuda"),
        default="triton",
        help="whose plans: tiles of the Triton back-end (the default), or columns and clusters of the sm_90a kernels",
    )
    parser.add_argument("--quant", choices=FORMATS, help="a quantised w (default: a dense one)")
    parser.add_argument(
        "--double-quant", action="store_true", help="with --quant nf4 or fp4: its scales quantised too, as in QLoRA"
    )
    parser.add_argument("--dropout", type=probability, default=0.0, metavar="P", help="default: 0")
    parser.add_argument("--seconds", type=float, metavar="S", help="begin no further pass after this long")
    parser.add_argument(
        "--stuck",
        type=float,
        default=60.0,
        metavar="S",
        help=f"end with exit status {STUCK} where a candidate takes longer; what was found is kept (default: 60)",
    )
    parser.add_argument("--device", default="cuda", help="such as cuda:1 (default: the current one)")
    parser.add_argument("--dry-run", action="store_true", help="measure and show, but keep nothing")
    parser.add_argument(
        "--forget", action="store_true", help="delete what is kept for this device, and measure nothing"
    )


def main(args: argparse.Namespace) -> int:
    """Exit status: 0; 1 where some shape could not be measured; 2 where there is no GPU that the back-end serves; 3
    where a candidate did not end."""
    show = terminal()
    if args.double_quant and args.quant not in quant_tables.LEVELS:
        show.line(f"tune: --double-quant goes with --quant nf4 or fp4, not with {args.quant or 'a dense w'}")
        return 2
    dtype = {short: each for each, short in SHORT.items()}[args.dtype]
    adapter_dtype = torch.float32 if args.fp32_adapters else dtype
    subject = _find(args.backend, args.device, dtype, adapter_dtype, args.dropout, args.quant, args.double_quant)
    if isinstance(subject, str):
        show.line(f"tune: {subject}")
        return 2
    name = subject.setting.name
    if args.forget:
        was_there = tuned.forget(name)
        show.line(f"{'Deleted' if was_there else 'There was nothing to delete'}: {tuned.path(name)}")
        return 0
    tuner = Tuner(subject, show)
    weight = f"w in {subject.setting.w_format}, " if args.quant else ""
    show.line(f"{name}: {args.dtype}, {weight}{SHORT[adapter_dtype]} adapters, dropout {args.dropout:g}")
    with subject.guard():
        complete = tuner.tune(args.shapes, keep=not args.dry_run, seconds=args.seconds, stuck=args.stuck)
    show.table("Plans, old against new", ("shape", "pass", "old µs", "new µs", "new / old", "new plan"), tuner.rows)
    if args.dry_run:
        show.line("A dry run: nothing was kept.")
    elif tuned.path(name).exists():
        show.line(f"Kept: {tuned.path(name)}, {len(tuned.load(name))} plans that differ from the tables'")
    return 0 if complete else 1


def _find(
    backend: str,
    name: str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    p: float,
    quant: str | None,
    double_quant: bool,
) -> Subject | str:
    """What there is to measure, or why there is nothing to measure on."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        return f"--device {name}: {first_line(error)}"
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            return f"needs a GPU: torch {torch.__version__} sees {torch.cuda.device_count()}, and --device is {name}"
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    needs = "needs a GPU that Triton serves" if backend == "triton" else "needs a GPU that the sm_90a kernels serve"
    try:
        module = dispatch.load(backend)
    except ImportError as error:
        return f"{needs}: {first_line(error)}"
    call = Call("forward", device, dtype, adapter_dtype, 16, 16, 16, 16, False, quant or "dense")
    if refusals := module.why_not(call):
        return f"{needs}: {'; '.join(refusals)}"
    if backend == "cuda":
        from lora_kernels.tools.tune.cuda import CudaSubject

        return CudaSubject(Setting(device, torch.cuda.get_device_name(device), dtype, adapter_dtype, p))
    from lora_kernels.backends.triton.device import find_target
    from lora_kernels.tools.tune.triton import TritonSubject

    target = find_target(device)
    assert target is not None and target.name is not None, "why_not has asked for it, and drivers name their devices"
    return TritonSubject(target, Setting(device, target.name, dtype, adapter_dtype, p, quant, double_quant))
