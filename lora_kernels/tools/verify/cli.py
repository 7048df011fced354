"""``python -m lora_kernels verify``: find out which kernels are right and fast on this machine, and keep it."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lora_kernels.evidence import file, find
from lora_kernels.evidence.file import Evidence
from lora_kernels.evidence.identity import Identity
from lora_kernels.testing.terminal import Terminal, terminal
from lora_kernels.tools.verify import options, processes, report
from lora_kernels.tools.verify.options import Wanted
from lora_kernels.tools.verify.processes import WELL, Job
from lora_kernels.tools.verify.run import Run

add_arguments = options.add_arguments

INTERRUPTED = 130


def main(args: argparse.Namespace) -> int:
    """Run the command and return its exit status.

    0: done, or with --check: there is evidence. 1: something could not be measured, or with --check: there is none.
    2: nothing can be measured here. 130: interrupted.
    """
    show = terminal()
    try:
        with _ended_gently():
            return _run(args, show)
    except KeyboardInterrupt:
        show.line("Interrupted. What was found until then is kept.")
        return INTERRUPTED


def _run(args: argparse.Namespace, show: Terminal) -> int:
    wanted = options.wanted(args)
    if isinstance(wanted, str):
        return _refuse(show, wanted)
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        return _refuse(show, f"this is rank {rank} of several processes. Run it once, before they are started")
    if args.out is not None and ":" in str(args.out.resolve()):
        return _refuse(show, f"--out {args.out}: {find.VARIABLE} separates files by colons, so its path may have none")
    gpus = _survey(args.device, wanted, _environment(args), show)
    if isinstance(gpus, str):
        return _refuse(show, gpus)
    if args.check:
        return _check(gpus, show)
    if args.out is not None and len(gpus) > 1:
        names = ", ".join(f"{gpu['device']} ({gpu['identity']['device']})" for gpu in gpus)
        return _refuse(show, f"--out takes one file, and this machine has several kinds of GPU: name one of {names}")
    if args.forget:
        return _forget(gpus, args.out, show)
    return _measure(gpus, args, wanted, show)


def _environment(args: argparse.Namespace) -> dict[str, str]:
    """Return where the survey looks for evidence: where training would, or for a measurement in its own file alone."""
    if args.out is not None:
        return {find.VARIABLE: str(args.out.resolve())}
    return {} if args.check else {find.VARIABLE: ""}


def _refuse(show: Terminal, why: str) -> int:
    show.line(f"verify: {why}")
    return 2


def _survey(name: str | None, wanted: Wanted, environment: dict[str, str], show: Terminal) -> list[Any] | str:
    """Return what is known about every kind of GPU of this machine, or a sentence that says why there is none."""
    gpus: list[Any] = []
    what = {
        "kind": "survey",
        "device": name,
        "settings": [each.to_json() for each in wanted.judged],
        "timed": wanted.timed.to_json(),
        "passes": wanted.passes,
        "most": wanted.most,
    }
    job = Job("survey", what, lambda event: gpus.append(event["survey"]), environment)
    for _, ending in processes.run([job], 1, processes.SLOW_SECONDS):
        if ending.how != WELL:
            return f"the GPUs of this machine could not be found out: {ending.why}"
    if gpus:
        return gpus
    there = "no GPU" if name is None else f"no {name}"
    return (
        f"needs a GPU, and torch {torch.__version__} sees {there} on this machine "
        "(python -m lora_kernels doctor tells what is missing)"
    )


def _check(gpus: Sequence[Any], show: Terminal) -> int:
    """Say whether the evidence about these GPUs is complete, and return the exit status."""
    status = 0
    for gpu in gpus:
        faults = report.gaps(gpu)
        name = f"{gpu['device']} ({gpu['identity']['device']})"
        if faults:
            show.line(f"✗ {name}:")
            for fault in faults:
                show.line(f"    {fault}")
            status = 1
        else:
            show.line(f"✓ {name}: {', '.join(gpu['used'])}")
    return status


def _forget(gpus: Sequence[Any], out: Path | None, show: Terminal) -> int:
    for gpu in gpus:
        path = out or find.cache_path(Identity(**gpu["identity"]))
        try:
            existed = path.exists()
            path.unlink(missing_ok=True)
        except OSError as error:
            return _refuse(show, f"{path} cannot be deleted ({error.strerror or error})")
        show.line(f"{'Deleted' if existed else 'There was nothing to delete'}: {path}")
    return 0


def _measure(gpus: Sequence[Any], args: argparse.Namespace, wanted: Wanted, show: Terminal) -> int:
    end = None if args.seconds is None else time.monotonic() + args.seconds
    complete = True
    for gpu in gpus:
        identity = Identity(**gpu["identity"])
        path = (args.out or find.cache_path(identity)).resolve()
        try:
            with _alone(path):
                file.add(path, Evidence(identity))  # what is stale goes, and an error comes before the work
                run = Run(gpu, path, wanted, args, end, show)
                run.measure()
                complete &= run.complete
                run.tell()
        except Busy as error:
            return _refuse(show, str(error))
        except OSError as error:
            return _refuse(show, report.unwritable(path, error))
    return 0 if complete else 1


class Busy(RuntimeError):
    """Another process verifies the same device."""


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock beside a file while its device is measured. Raises Busy, which names the holder, where another
    process has it, and OSError where the lock cannot be written."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.verify"), "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Busy(f"another verify is running: {lock.read().strip() or 'its process is not known'}") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%H:%M:%S')}\n")
        lock.flush()
        yield


@contextlib.contextmanager
def _ended_gently() -> Iterator[None]:
    """Treat SIGTERM, by which containers are stopped, as Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
