"""The options of ``verify``, and what they ask for."""

from __future__ import annotations

import argparse
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from lora_kernels.quant import tables as quant_tables
from lora_kernels.quant.weight import FORMATS
from lora_kernels.testing.names import SHORT
from lora_kernels.testing.watch import first_line
from lora_kernels.tools.verify import cases
from lora_kernels.tools.verify.model import projections
from lora_kernels.tools.verify.subject import Setting, Size
from lora_kernels.tools.verify.times import Pass

LLAMA = ((4096, 4096), (4096, 14336), (14336, 4096))
"""(K, N) of projections of Llama-3.1-8B: q, up and down."""
RANK = 16
TRAINING, DECODING = (2048, 8192), (1, 16)
"""The rows of x."""
FEW = 64
"""Up to this M only the forward without dropout is timed: it is a step of decoding."""
ROUNDS, QUICK_ROUNDS = 9, 5


class Wanted(NamedTuple):
    """What the options ask for."""

    timed: Setting
    """The types that are timed."""
    judged: list[Setting]
    """The types whose classes of kernels are judged."""
    passes: list[Pass]
    rounds: int
    most: int
    """The number of cases for each class."""


def size(text: str) -> Size:
    """Return the size that a text such as "8192x4096x14336:16" names as M, K, N and r.

    Raises argparse.ArgumentTypeError for any other text.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+)", text)
    result = Size(*map(int, match.groups())) if match else None
    if result is None or not all(result):
        raise argparse.ArgumentTypeError(f"{text!r}: expected MxKxN:r, such as 8192x4096x14336:16")
    if result.K % 8 or result.N % 8:
        raise argparse.ArgumentTypeError(
            f"{text!r}: K and N must be multiples of 8; operands of other sizes are served, but not measured"
        )
    return result


def probability(text: str) -> float:
    """Return a dropout probability. Raises argparse.ArgumentTypeError outside [0, 1)."""
    with suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected 0 <= p < 1")


def positive(text: str) -> float:
    """Return a number above 0. Raises argparse.ArgumentTypeError for others."""
    with suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``verify``."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--shapes", nargs="+", type=size, metavar="MxKxN:r",
        help="the layers to time (default: projections of Llama-3.1-8B, r 16, in training and decoding)",
    )  # fmt: skip
    what.add_argument(
        "--model", type=Path, metavar="config.json", help="time the linear layers of the model that this file describes"
    )
    # fp32 is left out: its speed depends on torch.get_float32_matmul_precision(), which is no part of the evidence.
    add("--dtype", choices=("bf16", "fp16"), default="bf16", help="dtype of x and w (default: bf16)")
    add(
        "--adapters", choices=("fp32", "x"), default="fp32",
        help="the dtype of A and B that is timed: fp32, as apply_lora and PEFT make them, or x's own (default: fp32)",
    )  # fmt: skip
    add("--quant", choices=FORMATS, help="the format of a quantised w (default: a dense w)")
    add("--double-quant", action="store_true", help="with --quant nf4 or fp4: quantise its scales too, as in QLoRA")
    add(
        "--dropout", type=probability, default=0.05, metavar="P",
        help="the dropout probability that is timed beside 0 (default: 0.05)",
    )  # fmt: skip
    add("--device", help="one GPU, such as cuda:1 (default: every kind of GPU of this machine, each once)")
    add("--tune", action="store_true", help="also measure plans of triton and cuda, and keep the fastest")
    add("--quick", action="store_true", help="one case for each class of kernels, fewer layers and fewer rounds")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the evidence to FILE, not to the user's cache; LORA_KERNELS_EVIDENCE=FILE lets processes read it",
    )
    add("--jobs", type=int, default=4, metavar="N", help="classes of kernels that are judged at once (default: 4)")
    add(
        "--timeout", type=positive, default=45.0, metavar="S",
        help="the seconds after which a kernel counts as stuck and its process is ended (default: 45)",
    )  # fmt: skip
    add("--seconds", type=positive, metavar="S", help="begin nothing more after this many seconds (default: no limit)")
    add(
        "--check", action="store_true",
        help="run no kernel; exit with 0 if the evidence for this machine and these options is complete, else with 1",
    )  # fmt: skip
    add("--forget", action="store_true", help="delete the evidence about this machine's GPUs, and run no kernel")


def wanted(args: argparse.Namespace) -> Wanted | str:
    """Return what the options ask for, or a sentence that says why they cannot be served."""
    if args.double_quant and args.quant not in quant_tables.LEVELS:
        return f"--double-quant goes with --quant nf4 or fp4, not with {args.quant or 'a dense w'}"
    if args.jobs < 1:
        return f"--jobs {args.jobs}: at least one process has to run: give 1 or more"
    try:
        if args.device is not None:
            torch.device(args.device)
        sizes = _sizes(args)
    except RuntimeError as error:
        return f"--device {args.device}: {first_line(error)}"
    except ValueError as error:
        return f"--model: {error}"
    dtype = {short: each for each, short in SHORT.items()}[args.dtype]
    adapter_dtype = torch.float32 if args.adapters == "fp32" else dtype
    timed = Setting(dtype, adapter_dtype, 0.0, args.quant, args.double_quant)
    judged = [timed._replace(adapter_dtype=each) for each in (dtype, torch.float32)]
    passes = [
        Pass(each, p, op)
        for each in sizes
        for p in dict.fromkeys((0.0, args.dropout))
        for op in cases.PASSES
        if each.M > FEW or (op == "forward" and p == 0)
    ]
    return Wanted(timed, judged, passes, QUICK_ROUNDS if args.quick else ROUNDS, 1 if args.quick else cases.MOST)


def _sizes(args: argparse.Namespace) -> list[Size]:
    """Return the sizes to time. Raises ValueError for a model that has none."""
    if args.shapes:
        return list(dict.fromkeys(args.shapes))
    layers = LLAMA if args.model is None else projections(args.model)
    decoded = layers[:1] if args.model is None else layers
    training, decoding = (TRAINING[:1], DECODING[-1:]) if args.quick else (TRAINING, DECODING)
    return [Size(M, K, N, RANK) for M in training for K, N in layers] + [
        Size(M, K, N, RANK) for M in decoding for K, N in decoded
    ]
