"""``python -m lora_kernels tune``: measure plans of a back-end on this GPU, and keep the fastest.

`triton` and `cuda` tell which plans are measured, and `measure` does it. Nothing else in the package searches for
plans.
"""

from __future__ import annotations

import argparse
import re
from contextlib import suppress

import torch

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Call
from lora_kernels.plans import choose, store
from lora_kernels.quant import tables as quant_tables
from lora_kernels.quant.weight import FORMATS
from lora_kernels.testing.names import SHORT
from lora_kernels.testing.terminal import terminal
from lora_kernels.testing.watch import STUCK, first_line
from lora_kernels.tools.tune.measure import Limits, Tuner
from lora_kernels.tools.tune.subject import Setting, Size, Subject

DEFAULT = (
    Size(8192, 4096, 4096, 16),
    Size(8192, 4096, 14336, 16),
    Size(8192, 14336, 4096, 16),
    Size(16, 4096, 4096, 16),
)
"""Projections of Llama-3.1-8B: q, up and down in training, q in decoding."""


def size(text: str) -> Size:
    """Return the size that a text such as "8192x4096x14336:16" names as M, K, N and r.

    Raises argparse.ArgumentTypeError for any other text.
    """
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
    """Return a dropout probability. Raises argparse.ArgumentTypeError outside [0, 1)."""
    with suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected 0 <= p < 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``tune``."""
    defaults = " ".join(map(str, DEFAULT))
    parser.add_argument(
        "--shapes", nargs="+", type=size, default=DEFAULT, metavar="MxKxN:r", help=f"default: {defaults}"
    )
    # fp32 is left out: its speed depends on torch.get_float32_matmul_precision(), which is not part of a plan's key.
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="dtype of x and w (default: bf16)")
    parser.add_argument(
        "--fp32-adapters", action="store_true", help="keep a and b in fp32 (PEFT's default), not in x's dtype"
    )
    parser.add_argument(
        "--backend",
        choices=("triton", "cuda"),
        default="triton",
        help="the back-end whose plans are measured: triton (the default), or cuda, the sm_90a kernels",
    )
    parser.add_argument("--quant", choices=FORMATS, help="the format of a quantised w (default: a dense w)")
    parser.add_argument(
        "--double-quant", action="store_true", help="with --quant nf4 or fp4: quantise its scales too, as in QLoRA"
    )
    parser.add_argument(
        "--dropout", type=probability, default=0.0, metavar="P", help="dropout probability (default: 0)"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="begin no further pass after this many seconds")
    parser.add_argument(
        "--stuck",
        type=float,
        default=60.0,
        metavar="S",
        help=f"end with exit status {STUCK} where one plan takes longer; plans found by then are kept (default: 60)",
    )
    parser.add_argument("--device", default="cuda", help="the GPU, such as cuda:1 (default: the current one)")
    parser.add_argument("--dry-run", action="store_true", help="measure and show, but keep nothing")
    parser.add_argument(
        "--forget", action="store_true", help="delete what is kept for this device, and measure nothing"
    )


def main(args: argparse.Namespace) -> int:
    """Run the command and return its exit status.

    0: done. 1: some shape could not be measured, or its plan not kept. 2: there is no GPU that the back-end serves.
    3: a plan did not end.
    """
    show = terminal()
    if args.double_quant and args.quant not in quant_tables.LEVELS:
        show.line(f"tune: --double-quant goes with --quant nf4 or fp4, not with {args.quant or 'a dense w'}")
        return 2
    dtype = {short: each for each, short in SHORT.items()}[args.dtype]
    adapter_dtype = torch.float32 if args.fp32_adapters else dtype
    setting = Setting(dtype, adapter_dtype, args.dropout, args.quant, args.double_quant)
    subject = _find(args.backend, args.device, setting)
    if isinstance(subject, str):
        show.line(f"tune: {subject}")
        return 2
    name = subject.on.name
    if args.forget:
        was_there = choose.forget(name)
        show.line(f"{'Deleted' if was_there else 'There was nothing to delete'}: {store.path(name)}")
        return 0
    tuner = Tuner(subject, show)
    weight = f"w in {setting.w_format}, " if args.quant else ""
    show.line(f"{name}: {args.dtype}, {weight}{SHORT[adapter_dtype]} adapters, dropout {args.dropout:g}")
    with subject.guard():
        complete = tuner.tune(args.shapes, not args.dry_run, Limits(args.seconds, args.stuck))
    show.table("Plans, old against new", ("shape", "pass", "old µs", "new µs", "new / old", "new plan"), tuner.rows)
    if args.dry_run:
        show.line("A dry run: nothing was kept.")
    elif store.path(name).exists():
        show.line(f"Kept: {store.path(name)}, {len(store.load(name))} plans that differ from the tables'")
    return 0 if complete else 1


def _find(backend: str, name: str, setting: Setting) -> Subject | str:
    """Return the back-end on the device called `name`, or the reason why it cannot be measured there."""
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
    w_format = setting.quant or "dense"
    call = Call("forward", device, setting.dtype, setting.adapter_dtype, 16, 16, 16, 16, False, w_format)
    if refusals := module.why_not(call):
        return f"{needs}: {'; '.join(refusals)}"
    # The back-ends are imported where they are measured: Triton is optional and slow to import.
    if backend == "cuda":
        from lora_kernels.tools.tune.cuda import CudaSubject

        return CudaSubject(device, setting)
    from lora_kernels.tools.tune.triton import TritonSubject

    return TritonSubject(device, setting)
