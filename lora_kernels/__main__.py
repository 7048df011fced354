"""The command line of the package: ``python -m lora_kernels doctor | verify | bench | analyse | run``."""

from __future__ import annotations

import argparse
import sys

from lora_kernels.bench import run
from lora_kernels.tools import analyse, doctor
from lora_kernels.tools import run as run_program
from lora_kernels.tools.verify import cli as verify


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["run"]:
        return run_program.main(argv[1:])  # the arguments of another program are not parsed
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show × then gets a ?, not a traceback
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(prog="python -m lora_kernels", description="Fused LoRA layers for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor.add_arguments(
        commands.add_parser("doctor", help="show what serves this machine, what is missing and how to get it")
    )
    run.add_arguments(commands.add_parser("bench", help="measure the layer against the frozen one, PEFT and others"))
    verify.add_arguments(
        commands.add_parser(
            "verify", help="find out which GPU kernels are right and fast on this machine, and switch them on"
        )
    )
    analyse.add_arguments(
        commands.add_parser("analyse", help="show what an adapter has learned: ranks, directions, what it does to W")
    )
    commands.add_parser("run", help="run a script, a module or a command with PEFT's LoRA layers fused")
    args = parser.parse_args(argv)
    return {"analyse": analyse.main, "doctor": doctor.main, "bench": run.main, "verify": verify.main}[args.command](
        args
    )


if __name__ == "__main__":
    sys.exit(main())
