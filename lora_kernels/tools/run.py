"""The command `run`: a script, a module or a command, as Python itself would run it, with PEFT's layers fused.

The program runs in a process of its own with LORA_KERNELS=1 in its environment (`lora_kernels_autoload`). So its
arguments, modules, tracebacks and exit status are those that it has without this package, and the processes that it
starts have the variable too. This process passes signals on, and prints one line when the program has ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import entry_points
from types import FrameType

import lora_kernels_autoload as autoload
from lora_kernels.tools import told

USAGE = """usage: python -m lora_kernels run SCRIPT [ARGUMENTS ...]
       python -m lora_kernels run -m MODULE [ARGUMENTS ...]
       python -m lora_kernels run COMMAND [ARGUMENTS ...]

Run a program as Python itself would, with every LoRA layer that PEFT makes fused, in all processes of the program.
COMMAND is a program of this environment or on PATH: torchrun, accelerate launch, axolotl train, swift sft, trl sft.
"""

_ENTRY = "lora_kernels_autoload:install"
_PASSED_ON = ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_FROM_TERMINAL = ("SIGINT", "SIGQUIT")
"""The signals that a terminal sends to the program too."""


def main(args: list[str]) -> int:
    """Run the program that `args` name, print the line, and return the program's exit status.

    Where a signal has ended the program, it ends this process too. The status is 2 where nothing was run.
    """
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    try:
        command = command_of(args)
        why_not()
    except ValueError as error:
        print(f"python -m lora_kernels run: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="lora_kernels-run-", ignore_cleanup_errors=True) as folder:
        status = _wait(command, {**os.environ, autoload.VARIABLE: "1", autoload.RUN: folder})
        print(f"lora_kernels: {told.line(told.read(folder))}", file=sys.stderr)
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def command_of(args: list[str]) -> list[str]:
    """Return the command for the program that `args` name. Raises ValueError where there is none."""
    python = [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]
    if args[0] == "-m":
        if len(args) == 1:
            raise ValueError("-m needs the name of a module")
        return [*python, *args]
    if args[0].startswith("-"):
        raise ValueError(
            f"{args[0]} is no option of run. Options of Python stand before: python {args[0]} -m lora_kernels run ..."
        )
    if os.path.exists(args[0]):
        return [*python, *args]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = None if os.path.dirname(args[0]) else shutil.which(args[0], path=path)
    if found is None:
        raise ValueError(
            f"there is no file {args[0]!r}"
            + ("" if os.path.dirname(args[0]) else f", and no command of this name in {path}")
        )
    return [found, *args[1:]]


def why_not() -> None:
    """Raise ValueError where LORA_KERNELS=1 would not reach the program."""
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        raise ValueError(
            "the environment variable TORCH_DEVICE_BACKEND_AUTOLOAD keeps torch from calling lora_kernels: unset it, "
            "or call lora_kernels.enable() in the program"
        )
    value = os.environ.get(autoload.VARIABLE, "")
    autoload.check(value)
    if value.strip() == "0":
        raise ValueError(f"the environment variable {autoload.VARIABLE} is 0, which switches off what run does")
    if not any(entry.value == _ENTRY for entry in entry_points(group="torch.backends")):
        raise ValueError(
            "torch would not call lora_kernels, because the installed package does not name its entry point for torch. "
            "Install it (in a checkout: pip install -e .), or call lora_kernels.enable() in the program"
        )


def _wait(command: list[str], environment: dict[str, str]) -> int:
    """Run the command and return its status, negative for a signal. Signals to this process go to the command."""
    early: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        if child is None:
            early.append(number)
        elif not (signal.Signals(number).name in _FROM_TERMINAL and _in_foreground()):
            child.send_signal(number)

    numbers = [getattr(signal, name) for name in _PASSED_ON if hasattr(signal, name)]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        child = subprocess.Popen(command, env=environment)
        for number in early:
            child.send_signal(number)
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    """Return whether this process and its child belong to a terminal's foreground, so that both get its signals."""
    try:
        return os.tcgetpgrp(sys.__stdin__.fileno()) == os.getpgrp()  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        return False
