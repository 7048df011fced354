"""The command line of the package: ``python -m lora_kernels doctor | verify | bench | analyse | run``."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import lora_kernels

_COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("tools.doctor", "show what serves this machine, what is missing and how to get it"),
    "bench": ("bench.run", "measure the layer against the frozen one, PEFT and others"),
    "verify": ("tools.verify.cli", "find out which GPU kernels are right and fast on this machine, and switch them on"),
    "analyse": ("tools.analyse", "show what an adapter has learned: ranks, directions, what it does to W"),
    "run": ("tools.run", "run a script, a module or a command with PEFT's LoRA layers fused"),
}
"""The module of each command, which is imported when the command is given, and what it does."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status. Without a command the help is shown."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show × then gets a ?, not a traceback
            stream.reconfigure(errors="replace")
    called = Path(sys.argv[0]).stem
    prog = called if called in ("lora_kernels", "lora-kernels") else "python -m lora_kernels"
    parser = argparse.ArgumentParser(prog=prog, description="Fused LoRA layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"lora_kernels {lora_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = argv[0] if argv and argv[0] in _COMMANDS else ""
    if command not in ("", "doctor") and (fault := lora_kernels.torch_fault()):
        print(f"{prog} {command}: {fault}. {prog} doctor shows what is here", file=sys.stderr)
        return 1
    module: Any = importlib.import_module(f"lora_kernels.{_COMMANDS[command][0]}") if command else None
    if command == "run":
        return int(module.main(argv[1:]))  # the arguments of another program are not parsed
    for name, (_, what) in _COMMANDS.items():
        each = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        if name == command:
            module.add_arguments(each)
    args = parser.parse_args(argv)
    if module is None:
        parser.print_help()
        return 0
    return int(module.main(args))


if __name__ == "__main__":
    sys.exit(main())
