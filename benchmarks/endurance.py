"""Thousands of random calls, each of them judged. Run it from the checkout:

    python -m benchmarks.endurance [--device cpu|cuda] [--backend NAME] [--calls N] [--seconds S] [--out FILE]

Every back-end that serves the device is called directly, forward and backward, on random shapes, ranks, p, dtypes,
strides and streams. Each call is judged by `lora_kernels.testing.judge` and made again, which must give the same bits.
After that two streams (two threads on a CPU) run at once, and on a GPU a CUDA graph is replayed with changing inputs.
These must give the same bits too.

A fault is printed with the options that repeat it: ``--backend NAME --seed S --only K``. A kind of call is a choice of
dtypes, dropout, strides, bias, and a range of ranks and rows. `--kinds` limits the number of kinds, for back-ends that
compile a kernel for each.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.endurance_cases import Case, draw
from lora_kernels.core.operands import Call
from lora_kernels.testing import machine, one_layer
from lora_kernels.testing.documents import write
from lora_kernels.testing.judge import Problem, judge, problem
from lora_kernels.testing.terminal import Terminal, terminal
from lora_kernels.testing.watch import STUCK, Watch, answers

BACKENDS = {"cuda": ("composite", "triton", "cuda"), "cpu": ("cpu", "eager")}
KINDS = {"composite": 12, "triton": 12}
"""The number of kinds of calls, if not 1000: Triton compiles kernels for each kind."""

_STRESS = 50
"""The number of times that two calls run at once."""
_ENOUGH = 20
"""After this many faults no more calls are made: if a kernel has broken the CUDA context, every call fails."""

Results = dict[str, Tensor | None]


@dataclass
class Record:
    """The results of one back-end."""

    backend: str
    calls: int = 0
    refused: int = 0
    stress: int = 0
    """The number of pairs of calls that ran at once."""
    replays: int = 0
    """The number of replays of a CUDA graph."""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def run(module: ModuleType, q: Problem) -> Results:
    """Return y, h and every gradient, from a back-end that is called as `lora_kernels.ops` calls it."""
    y, h = one_layer.forward_of(module, q)
    dx, da, db = one_layer.backward_of(module, q, h)
    return {"y": y, "h": h, "dx": dx, "da": da, "db": db}


def differences(got: Results, want: Results) -> list[str]:
    """Return the names of results that differ in any bit."""
    return [name for name, value in got.items() if not torch.equal(_bits(value), _bits(want[name]))]


def _bits(t: Tensor | None) -> Tensor:
    assert t is not None
    return t.view(torch.int16 if t.element_size() == 2 else torch.int32)


class Endurance:
    """Calls of one back-end on one device."""

    def __init__(self, name: str, device: torch.device, seed: int, kinds: int | None) -> None:
        self.device, self.seed = device, seed
        self.kinds = kinds or KINDS.get(name, 1000)
        self.module = importlib.import_module(f"lora_kernels.backends.{name}")
        self.record = Record(name)
        self.streams: list[Any] = [None]
        if device.type == "cuda":
            self.streams += [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def drawn(self, k: int) -> Case:
        """Return case k of this back-end."""
        return draw(self.seed, k, self.kinds, self.device.type)

    def case(self, k: int) -> None:
        """Run case k twice and judge it, unless the back-end refuses it."""
        case = self.drawn(k)
        call = Call("forward", self.device, case.dtype, case.adapter_dtype, case.M, case.N, case.K, case.R, case.p > 0)
        if any(self.module.why_not(call._replace(op=op)) for op in ("forward", "backward")):
            self.record.refused += 1
            return
        self.record.calls += 1
        q = case.problem(k, self.device)
        try:
            with self._on(self.streams[case.stream % len(self.streams)]):
                first, second = run(self.module, q), run(self.module, q)
            self._join()
            wrong = [f"{name} changes from run to run" for name in differences(first, second)]
            results = {name: value for name, value in first.items() if name != "h" and value is not None}
            wrong += [verdict.fault for verdict in judge(results, q) if verdict.fault is not None]
        except RuntimeError as error:
            wrong = [f"RuntimeError: {error}"]
        if wrong:
            self._fault(f"case {k}", f"--only {k}", f"{'; '.join(wrong)} ({case})")

    def stress(self) -> None:
        """Run two different calls at once, on two streams or threads. Each must give the bits that it gives alone."""
        pair = [self._served(1, large=True), self._served(2, large=True)]
        alone = [run(self.module, q) for q in pair]
        self._join()
        together: list[list[Results]] = [[], []]
        if self.device.type == "cuda":
            for _ in range(_STRESS):
                for which in (0, 1):
                    with self._on(self.streams[1 + which]):
                        together[which].append(run(self.module, pair[which]))
            self._join()
        else:
            threads = [threading.Thread(target=self._repeat, args=(pair[i], together[i])) for i in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.record.stress = _STRESS
        for which in (0, 1):
            wrong = {name for results in together[which] for name in differences(results, alone[which])}
            if wrong or len(together[which]) != _STRESS:
                self._fault(
                    f"two at once, call {which}", "--calls 0", f"{', '.join(sorted(wrong)) or 'no results'} differ"
                )

    def replay(self, times: int, advance: Callable[[], None]) -> None:
        """Replay a CUDA graph of a forward and a backward; its inputs change before every tenth replay."""
        if self.device.type != "cuda":
            return
        q = self._served(3, large=False)
        fresh = [self._served(3 + i, large=False) for i in range(4)]
        want = [run(self.module, each) for each in fresh]
        with self._on(self.streams[1]):
            run(self.module, q)
        self._join()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(self.module, q)
        for i in range(times):
            inputs = fresh[i // 10 % len(fresh)]
            if i % 10 == 0:
                for name in ("x", "w", "a", "b", "bias", "dy", "seed"):
                    getattr(q, name).copy_(getattr(inputs, name))
            graph.replay()
            self.record.replays += 1
            if i % 10 in (0, 9):  # the first of these inputs, and the last
                wrong = differences(got, want[i // 10 % len(fresh)])
                if wrong:
                    self._fault(f"replay {i}", "--calls 0", f"{', '.join(wrong)} differ from a call outside the graph")
                    return
            advance()

    def _served(self, seed: int, large: bool) -> Problem:
        M, width = (1000 + 128 * seed, 1024) if large else (200, 256)
        if self.device.type == "cpu":
            M, width = 40 + seed, 96
        dtype = torch.bfloat16
        return problem(M, width, width + 64, 16, dtype=dtype, p=0.1, seed=seed, device=self.device)

    def _repeat(self, q: Problem, results: list[Results]) -> None:
        for _ in range(_STRESS):
            results.append(run(self.module, q))

    def _on(self, stream: Any) -> Any:
        if stream is None:
            return nullcontext()
        stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)

    def _join(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _fault(self, what: str, again: str, said: str) -> None:
        name = self.record.backend
        self.record.faults.append(f"{name}, {what}: {said}\n    again: --backend {name} --seed {self.seed} {again}")


def endure(args: argparse.Namespace, name: str, device: torch.device, seconds: float | None, show: Terminal) -> Record:
    """Run one back-end: random calls until `args.calls` or `seconds` are spent, then stress and replays."""
    start = time.monotonic()
    one = Endurance(name, device, args.seed, args.kinds)
    cases = range(args.calls) if args.only is None else range(args.only, args.only + 1)
    watched = Watch(args.stuck, lambda what: show.line(f"✗ {what}"))
    with watched as watch, show.progress(len(cases) + args.replays) as advance:
        told = 0
        for k in cases:
            if seconds is not None and time.monotonic() - start > seconds:
                break
            watch(f"{name}, case {k}: {one.drawn(k)}\n    again: --backend {name} --seed {args.seed} --only {k}")
            one.case(k)
            advance(f"{name}: random calls", 1)
            for text in one.record.faults[told:]:
                show.line(f"✗ {text}")
            told = len(one.record.faults)
            if told >= _ENOUGH or (told and not answers(device)):
                break
        if args.only is None and answers(device):
            try:
                watch(f"{name}, two at once")
                one.stress()
                watch(f"{name}, graph replays")
                one.replay(args.replays, lambda: advance(f"{name}: graph replays", 1))
            except RuntimeError as error:
                one.record.faults.append(f"{name}, two at once or replays: RuntimeError: {error}")
        for text in one.record.faults[told:]:
            show.line(f"✗ {text}")
    one.record.seconds = round(time.monotonic() - start, 1)
    return one.record


def serves(name: str, device: torch.device) -> str:
    """Return why a back-end cannot be called on `device`; empty if it can."""
    try:
        module = importlib.import_module(f"lora_kernels.backends.{name}")
    except ImportError as error:
        return f"could not be loaded: {error}"
    call = Call("forward", device, torch.bfloat16, torch.bfloat16, 64, 64, 64, 16, True)
    return "; ".join(module.why_not(call))


def parser() -> argparse.ArgumentParser:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.endurance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="one or several back-ends (default: all of the device)"
    )
    parser.add_argument(
        "--calls", type=int, default=10_000, metavar="N", help="calls of each back-end (default: 10000)"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="seconds for the calls of all back-ends")
    parser.add_argument("--replays", type=int, default=1000, metavar="N", help="replays of the graph (default: 1000)")
    parser.add_argument("--kinds", type=int, metavar="N", help="kinds of calls (default: 12 for triton, else 1000)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--stuck",
        type=float,
        metavar="S",
        help=f"if a case takes longer than S seconds, name it and end with exit status {STUCK} (default: wait)",
    )
    parser.add_argument("--only", type=int, metavar="K", help="run case K alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Return 0; 1 if there is a fault or nothing was called; 2 if there is no such device. A case that
    does not end makes the process exit with status 3."""
    args = parser().parse_args(argv)
    show, device = terminal(), torch.device(args.device)
    if device.type not in BACKENDS or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        sees = f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        show.line(f"--device {args.device}: expected one of {' and '.join(BACKENDS)}; {sees}")
        return 2
    device = torch.device("cuda", device.index or 0) if device.type == "cuda" else device
    named = args.backend or list(BACKENDS[device.type])
    why_not = {name: serves(name, device) for name in named}
    for name, reason in why_not.items():
        if reason:
            show.line(f"{name} is not called: {reason}")
    found = [name for name in named if not why_not[name]]
    show.line(f"{machine.describe_device(device)['name']}: {', '.join(found) or 'nothing'}, --seed {args.seed}")
    share = None if args.seconds is None else args.seconds / max(1, len(found))
    records = [endure(args, name, device, share, show) for name in found]
    header = ["back-end", "calls", "refused", "at once", "replays", "s", "faults"]
    rows = [
        [r.backend, *(str(n) for n in (r.calls, r.refused, r.stress, r.replays, r.seconds)), str(len(r.faults))]
        for r in records
    ]
    show.table("Endurance", header, rows)
    if args.out:
        found_on = machine.describe_device(device)
        write({"seed": args.seed, "device": found_on, "records": [asdict(r) for r in records]}, args.out)
    failed = any(r.faults for r in records) or not any(r.calls for r in records)
    show.line("✗ faults, or nothing called" if failed else "✓ no faults")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
