"""A script that runs `lora_kernels verify`, or one of its processes, on a GPU that the CPU plays.

    python verify_on_cpu.py verify OPTION ...        the command
    python verify_on_cpu.py child JOB EVENTS         a process that the command starts

Each back-end is named by what its kernels do. They serve forwards without dropout, and most take no time.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from support.fake_gpu import CPU, IDENTITY

from lora_kernels.backends import dispatch, eager
from lora_kernels.core.operands import Call
from lora_kernels.evidence import identity
from lora_kernels.tools.verify import cases, child, judging, processes, survey
from lora_kernels.tools.verify.subject import Size

waiting: list[Callable[[], None]] = []
"""What the launched kernels do while they are waited for."""
calls: dict[str, int] = {}


def computed(name: str, change: Callable[[torch.Tensor], None] = lambda y: None) -> Callable[..., Any]:
    def forward(x, bases, adapters, save_h):
        calls[name] = calls.get(name, 0) + 1
        ys, hs = eager.forward(x, bases, adapters, save_h)
        change(ys[0])
        return ys, hs

    return forward


def wrong(y: torch.Tensor) -> None:
    y[3, 5] += 8


def stuck(y: torch.Tensor) -> None:
    waiting.append(lambda: time.sleep(600))


def compiles_slowly(y: torch.Tensor) -> None:
    if calls["compiles_slowly"] == 1:
        time.sleep(float(os.environ["COMPILES_FOR"]))


def killed(y: torch.Tensor) -> None:
    waiting.append(lambda: os.kill(os.getpid(), signal.SIGSEGV))


def slower(y: torch.Tensor) -> None:
    time.sleep(0.05)


def hangs_when_timed(y: torch.Tensor) -> None:
    if y.shape[0] == 128 and calls["hangs_when_timed"] > 2:  # the first two are judged
        time.sleep(600)


KERNELS = {each.__name__: each for each in (wrong, stuck, compiles_slowly, killed, slower, hangs_when_timed)}


def why_not(call: Call) -> list[str]:
    served = call.op == "forward" and not call.dropout and call.adapter_dtype == call.dtype
    return [] if served else ["serves forwards without dropout, with adapters in x's dtype"]


def module(name: str) -> Any:
    forward = computed(name, KERNELS.get(name, lambda y: None))
    return SimpleNamespace(name=name, why_not=why_not, kernel_class=lambda call: "all", forward=forward)


def install(names: list[str]) -> None:
    """Make the CPU a GPU with the back-ends `names`, of which `composite` is a right one that takes no time."""
    modules = {name: module(name) for name in names}
    slow_eager = functools.partial(delayed, eager.forward)
    modules["eager"] = SimpleNamespace(name="eager", why_not=eager.why_not, forward=slow_eager, backward=eager.backward)
    identity.identify = lambda device: IDENTITY
    dispatch.BY_EVIDENCE = {"cpu"}
    dispatch.load = lambda name: modules[name]
    dispatch.AUTOMATIC["cpu"] = (*reversed(names), "eager")
    cases.CASES = ((Size(72, 64, 48, 16), 0.0), (Size(40, 32, 48, 8), 0.0), (Size(72, 64, 48, 16), 0.1))
    survey._all_devices = lambda: [CPU]
    judging.synchronize = synchronize
    processes.START = (sys.executable, __file__, "child")


def delayed(forward: Callable[..., Any], *args: Any) -> Any:
    time.sleep(0.03)
    return forward(*args)


def synchronize(device: torch.device) -> None:
    while waiting:
        waiting.pop()()


if __name__ == "__main__":
    torch.set_num_threads(1)
    install(os.environ["BACK_ENDS"].split())
    what, *words = sys.argv[1:]
    if what == "child":
        sys.exit(child.main(words))
    from lora_kernels import __main__ as command  # the other processes do without what it imports

    sys.exit(command.main([what, *words]))
