"""``python -m lora_kernels tune``: measure plans of the Triton back-end on this GPU, and keep the fastest.

Every candidate stands behind the bench's gate, and must give the same bits twice; what fails to compile, asks for more
than the GPU has or is wrong is dropped. Nothing else in the package searches.
"""

from __future__ import annotations

import argparse
import re
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels import random
from lora_kernels.backends import Call
from lora_kernels.bench import gate, timing
from lora_kernels.bench.shapes import SHORT
from lora_kernels.bench.terminal import Terminal, terminal
from lora_kernels.kernels import tuned
from lora_kernels.kernels.candidates import Size, candidates
from lora_kernels.kernels.tiles import Plan

ROUNDS = 9
GRAPH_ROWS = 1024
"""Calls of at most this M are timed in a CUDA graph: they may be shorter than Python needs to launch them."""
OPS = ("forward", "backward")

DEFAULT = (
    Size(8192, 4096, 4096, 16),
    Size(8192, 4096, 14336, 16),
    Size(8192, 14336, 4096, 16),
    Size(16, 4096, 4096, 16),
)
"""Projections of Llama-3.1-8B: q, up and down in training, q in decoding."""


class DeviceLost(RuntimeError):
    """The GPU answers nothing any more, as after an illegal access."""


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
    parser.add_argument("--dropout", type=probability, default=0.0, metavar="P", help="default: 0")
    parser.add_argument("--device", default="cuda", help="such as cuda:1 (default: the current one)")
    parser.add_argument("--dry-run", action="store_true", help="measure and show, but keep nothing")
    parser.add_argument(
        "--forget", action="store_true", help="delete what is kept for this device, and measure nothing"
    )


def main(args: argparse.Namespace) -> int:
    """Exit status: 0; 1 where some shape could not be measured; 2 where there is no GPU that the back-end serves."""
    show = terminal()
    dtype = {short: each for each, short in SHORT.items()}[args.dtype]
    adapter_dtype = torch.float32 if args.fp32_adapters else dtype
    found = _find(args.device, dtype, adapter_dtype)
    if isinstance(found, str):
        show.line(f"tune: {found}")
        return 2
    tuner = Tuner(*found, dtype, adapter_dtype, args.dropout, show)
    name = tuner.target.name
    if args.forget:
        was_there = tuned.forget(name)
        show.line(f"{'Deleted' if was_there else 'There was nothing to delete'}: {tuned.path(name)}")
        return 0
    show.line(f"{name}: {args.dtype}, {SHORT[adapter_dtype]} adapters, dropout {args.dropout:g}")
    with tuner.target.guard():
        complete = tuner.tune(args.shapes, keep=not args.dry_run)
    show.table("Plans, old against new", ("shape", "pass", "old µs", "new µs", "new / old", "new plan"), tuner.rows)
    if args.dry_run:
        show.line("A dry run: nothing was kept.")
    elif tuned.path(name).exists():
        show.line(f"Kept: {tuned.path(name)}, {len(tuned.load(name))} plans that differ from the tables'")
    return 0 if complete else 1


def _find(name: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> tuple[ModuleType, torch.device, Any] | str:
    """(the launcher, the device, its target), or why there is nothing to measure on."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        return f"--device {name}: {_line(error)}"
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            return f"needs a GPU: torch {torch.__version__} sees {torch.cuda.device_count()}, and --device is {name}"
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    try:
        from lora_kernels.backends import _triton_launch, triton
    except ImportError as error:
        return f"needs a GPU that Triton serves: {_line(error)}"
    refusals = triton.why_not(Call("forward", device, dtype, adapter_dtype, 16, 16, 16, 16, False))
    if refusals:
        return f"needs a GPU that Triton serves: {'; '.join(refusals)}"
    return _triton_launch, device, _triton_launch.find_target(device)


class Operands:
    """One set of operands of a pass, and room for its results."""

    def __init__(self, q: gate.Problem) -> None:
        self.q = q
        # h as a forward saves it: what a backward is given.
        x = q.x.float() if q.seed is None else random.dropout(q.x.float(), q.p, q.seed)
        self.h = (x @ q.a.float().t()).to(q.x.dtype)
        self.results = self.room()

    def room(self) -> dict[str, Tensor]:
        """Room for what either pass writes. NaN: what is left of an earlier candidate's results must not pass for a
        result."""
        q = self.q
        like = {"y": q.dy, "h": self.h, "dx": q.x, "da": q.a, "db": q.b, "g": self.h}
        return {name: torch.full_like(t, torch.nan) for name, t in like.items()}


class Tuner:
    """Measures shape after shape; `rows` are what is to be shown of it."""

    def __init__(
        self,
        launch: ModuleType,
        device: torch.device,
        target: Any,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        p: float,
        show: Terminal,
    ) -> None:
        self.launch, self.device, self.target, self.show = launch, device, target, show
        self.dtype, self.adapter_dtype, self.p = dtype, adapter_dtype, p
        self.rows: list[tuple[str, ...]] = []

    def tune(self, sizes: list[Size], keep: bool) -> bool:
        """Both passes of every size; what is found is kept, if it is to be, as soon as it is. False where something
        could not be measured."""
        on, itemsize = (self.target.arch, self.target.multiprocessors), self.dtype.itemsize
        work = [(size, op, candidates(op, *on, itemsize, size, self.p > 0)) for size in sizes for op in OPS]
        complete = True
        with self.show.progress(sum(len(plans) + ROUNDS for _, _, plans in work)) as advance:
            for size, op, plans in work:
                try:
                    best = self._measure(size, op, plans, advance)
                except DeviceLost as error:
                    self.show.line(f"{size} {op}: {error}: nothing more can be measured by this process")
                    return False
                except torch.OutOfMemoryError as error:
                    self.show.line(f"{size} {op}: not measured: {_line(error)}")
                    complete = False
                    continue
                if best is None:
                    self.show.line(f"{size} {op}: no candidate is right")
                    complete = False
                elif keep:
                    complete &= self._keep(size, op, best, next(iter(plans.values())))
        return complete

    def _keep(self, size: Size, op: str, best: Plan, table: Plan) -> bool:
        """In the file, except what the tables say anyway. False where it cannot be written."""
        M, K, N, R = size
        entry = tuned.key(op, self.dtype, self.adapter_dtype, M, N, K, R, self.p > 0)
        plans = {key: plan for key, plan in tuned.load(self.target.name).items() if key != entry}
        try:
            tuned.store(self.target.name, plans if best is table else plans | {entry: best})
        except OSError as error:
            self.show.line(f"{size} {op}: not kept: {error} (XDG_CACHE_HOME names another cache directory)")
            return False
        return True

    def _measure(self, size: Size, op: str, plans: dict[str, Plan], advance: Any) -> Plan | None:
        """The fastest of those that are right; None where none is."""
        label = f"{size} {op}"
        bytes_per_set = self.dtype.itemsize * (size.N * size.K + size.M * (size.K + 2 * size.N))
        sets = [self._operands(size, seed) for seed in range(timing.operand_sets(self.device, bytes_per_set))]
        want, plain = gate.truth(sets[0].q), gate.evaluate(sets[0].q)
        steps: dict[str, list[timing.Step]] = {}
        timer = timing.timer_for(self.device)
        if self.device.type == "cuda" and size.M <= GRAPH_ROWS:
            timer = timing.GraphTimer()
        for name, plan in plans.items():
            advance(f"{label}: checking", 1)
            each = [self._step(op, plan, operands) for operands in sets]
            fault = self._fault(op, plan, sets[0], want, plain) or self._capture_fault(timer, each)
            if fault is None:
                steps[name] = each
            else:
                self.show.line(f"{label}: dropped {name}: {fault}")
        del want, plain
        if not steps:
            advance(label, ROUNDS)
            return None
        table, floor = next(iter(plans)), next(iter(steps))
        rounds = timing.interleave(floor, steps, ROUNDS, timer, lambda: advance(f"{label}: timing", 1))
        ratios = {name: timing.quartiles(rounds.ratios(name, floor)) for name in steps}
        best = min(ratios, key=lambda name: ratios[name][1])
        # What is not faster in three rounds of four is not known to be faster.
        best = best if ratios[best][2] < 1 else floor
        old, new = (f"{1e6 * timing.quartiles(rounds.seconds(name))[1]:.1f}" for name in (floor, best))
        same = "the tables'" if best == table else best
        was_right = floor == table
        self.rows.append(
            (str(size), op, old if was_right else "dropped", new, f"{ratios[best][1]:.3f}" if was_right else "", same)
        )
        return plans[best]

    def _operands(self, size: Size, seed: int) -> Operands:
        M, K, N, R = size
        return Operands(
            gate.problem(
                M,
                N,
                K,
                R,
                dtype=self.dtype,
                adapter_dtype=self.adapter_dtype,
                p=self.p,
                bias=False,
                seed=seed,
                device=self.device,
            )
        )

    def _step(self, op: str, plan: Plan, operands: Operands) -> timing.Step:
        return lambda: self._run(op, plan, operands, operands.results)

    def _run(self, op: str, plan: Plan, operands: Operands, out: dict[str, Tensor]) -> None:
        q = operands.q
        if op == "forward":
            launch = self.launch.forward_launch(
                self.target, plan, q.x, q.w, q.a, q.b, q.bias, out["y"], out["h"], q.scale, q.p, q.seed, True
            )
        else:
            launch = self.launch.backward_launch(
                self.target, plan, q.dy, q.x, q.w, q.a, q.b, operands.h,
                out["dx"], out["da"], out["db"], out["g"], q.scale, q.p, q.seed,
            )  # fmt: skip
        launch.run()

    def _fault(
        self, op: str, plan: Plan, operands: Operands, want: dict[str, Tensor], plain: dict[str, Tensor]
    ) -> str | None:
        """Why a plan is not to be used; None where it runs, is right, gives the same bits twice and leaves the
        workspace zero."""
        names = ("y", "h") if op == "forward" else ("dx", "da", "db")
        runs = []
        for _ in range(2):
            out = operands.room()
            sync, _ = self.launch.workspace(self.device, self.target, 0, 0)
            try:
                self._run(op, plan, operands, out)
                sync, _ = self.launch.workspace(self.device, self.target, 0, 0)  # it may have grown
                fault = "leaves flags or tickets in the workspace" if sync.any() else None
            except Exception as error:  # a candidate may fail in any way
                self._ask_device(error)
                fault = f"{type(error).__name__}: {_line(error)}"
            if fault:
                sync.zero_()
                return fault
            runs.append({name: out[name] for name in names})
        first, second = runs
        got = dict(first)
        if op == "forward":  # h is judged by the db that it gives
            h = got.pop("h").double()
            got["db"] = operands.q.scale * (operands.q.dy.double().t() @ h)
        faults = [verdict.fault for verdict in gate.judge(got, operands.q, want, plain) if verdict.fault]
        differing = [
            f"{name}: other bits in a second run" for name in names if not torch.equal(first[name], second[name])
        ]
        return "; ".join(faults or differing) or None

    def _capture_fault(self, timer: timing.Timer, steps: list[timing.Step]) -> str | None:
        if isinstance(timer, timing.GraphTimer):
            try:
                timer.capture(steps)
            except RuntimeError as error:
                self._ask_device(error)
                return f"in a CUDA graph: {_line(error)}"
        return None

    def _ask_device(self, error: Exception) -> None:
        """Raise DeviceLost where the device no longer answers after `error`."""
        try:
            torch.ones(1, device=self.device).item()
        except RuntimeError:
            raise DeviceLost(f"the GPU no longer answers after {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
