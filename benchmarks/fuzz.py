"""Random calls of the public functions and layers on a CPU, each of them judged. Run it from the checkout:

    python -m benchmarks.fuzz [--calls N | --minutes M] [--kind NAME] [--isa NAME] [--seed S] [--exact] [--only K]

One call has a kind (`lora_linear`, a group, many adapters, experts, DoRA, an embedding, a convolution, an attention, a
module, a PEFT layer), sizes, dtypes, strides, a format of W, a scale, dropout, leading dimensions, a number of threads,
and the gradients that are wanted.
Its results are judged against the equation in fp64. With ``--exact`` the operands are small integers for which every
sum is exact, and the results must have the bits of the reference: this finds an element from a wrong place that a
tolerance hides.

A fault is printed with the command that repeats it. `benchmarks.endurance` calls back-ends directly, on a GPU too.
"""

from __future__ import annotations

import argparse
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks import (
    fuzz_attention,
    fuzz_calls,
    fuzz_conv,
    fuzz_dora,
    fuzz_embedding,
    fuzz_experts,
    fuzz_layers,
    fuzz_multi,
)
from benchmarks.fuzz_draw import Draw
from lora_kernels import _C
from lora_kernels.testing.terminal import Terminal, terminal

KINDS: dict[str, tuple[float, Callable[[Draw], list[str]]]] = {
    "lora_linear": (0.44, fuzz_calls.linear),
    "group": (0.09, fuzz_calls.group),
    "multi": (0.06, fuzz_multi.multi),
    "experts": (0.06, fuzz_experts.experts),
    "dora_linear": (0.13, fuzz_dora.dora),
    "qdora": (0.05, fuzz_dora.quantised),
    "embedding": (0.06, fuzz_embedding.embedding),
    "conv": (0.08, fuzz_conv.conv),
    "attention": (0.06, fuzz_attention.attention),
    "module": (0.2, fuzz_layers.module),
    "peft": (0.02, fuzz_layers.peft),
}
"""The kinds of calls: how often each is drawn, and the function that makes one and returns what is wrong."""

_ENOUGH = 20
"""After this many faults no more calls are made."""


@dataclass
class Record:
    """What a run has found."""

    calls: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def kinds() -> list[str]:
    """Return the kinds that this machine can call: PEFT's need PEFT."""
    return [name for name in KINDS if name != "peft" or fuzz_layers.HAS_PEFT]


def one(seed: int, k: int, exact: bool, isa: str | None, kind: str | None = None) -> tuple[Draw, str, list[str]]:
    """Make call k. Return its draw, its kind, and what is wrong. Without `isa` and `kind` the draw chooses them."""
    draw, names = Draw(seed, k, exact), kinds()
    drawn_kind = draw.random.choices(names, [KINDS[name][0] for name in names])[0]
    kind = kind or drawn_kind
    best = _C.cpu_isa()
    drawn = draw.pick("isa", _C.cpu_isas())
    if isa is not None:
        draw.said[-1] = f"isa={isa}"
    try:
        _C.set_cpu_isa(isa or drawn)
        faults = KINDS[kind][1](draw)
    except Exception:  # a call may fail in any way, and each way is a fault
        faults = [traceback.format_exc(limit=-3).strip()]
    finally:
        _C.set_cpu_isa(best)
    return draw, kind, faults


def run(
    seed: int,
    calls: range,
    exact: bool,
    isa: str | None,
    show: Terminal,
    minutes: float | None = None,
    only: str | None = None,
) -> Record:
    """Make calls until `calls` or `minutes` are spent, and print every fault. `only` names the kind of all calls."""
    record, start = Record(), time.monotonic()
    with warnings.catch_warnings(), show.progress(len(calls)) as advance:
        warnings.simplefilter("ignore")  # of calls in fp64, which no kernel serves, and of checkpointing
        for k in calls:
            if minutes is not None and time.monotonic() - start > 60 * minutes:
                break
            draw, kind, faults = one(seed, k, exact, isa, only)
            record.calls += 1
            record.kinds[kind] += 1
            if faults:
                words = f"{' --exact' if exact else ''}{f' --isa {isa}' if isa else ''}"
                again = f"python -m benchmarks.fuzz --seed {seed} --only {k} --kind {kind}{words}"
                record.faults.append(
                    f"{kind}, call {k}: {'; '.join(faults)}\n    {' '.join(draw.said)}\n    again: {again}"
                )
                show.line(f"✗ {record.faults[-1]}")
            if record.calls % 50 == 0:
                advance("random calls", 50)
            if len(record.faults) >= _ENOUGH:
                break
    return record


def parser() -> argparse.ArgumentParser:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, metavar="N", help="the number of calls (default: 2000)")
    parser.add_argument("--minutes", type=float, metavar="M", help="the time for all calls")
    parser.add_argument("--kind", choices=kinds(), help="the kind of all calls (default: each call draws one)")
    parser.add_argument("--isa", choices=_C.cpu_isas(), help="an instruction set (default: each call draws one)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--exact", action="store_true", help="small integers, whose results must have the exact bits")
    parser.add_argument("--only", type=int, metavar="K", help="make call K alone")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Return 0, or 1 if there is a fault."""
    args, show = parser().parse_args(argv), terminal()
    calls = args.calls or (10**9 if args.minutes else 2000)
    which = range(calls) if args.only is None else range(args.only, args.only + 1)
    start = time.monotonic()
    record = run(args.seed, which, args.exact, args.isa, show, args.minutes, args.kind)
    seconds = time.monotonic() - start
    what = ", ".join(f"{count} {kind}" for kind, count in record.kinds.most_common())
    show.line(
        f"{record.calls} calls ({what}), isa {args.isa or 'drawn'}{', exact' if args.exact else ''}, torch "
        f"{torch.__version__}, in {seconds:.0f} s: {f'{len(record.faults)} faults' if record.faults else 'no faults'}"
    )
    return 1 if record.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
