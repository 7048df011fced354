"""The file that ninja builds from, and its run, which tells a person at a terminal how far it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from native_record import tell_terminal

QUIET = 10.0
"""The seconds after which a build that is not shown says on the terminal how far it is, and again after as many."""


class Ninja:
    """One build.ninja. Every object has its own flags, and objects are linked into modules."""

    def __init__(self, folder: Path, cxx: list[str], nvcc: str | None, verbose: bool):
        self.folder, self.verbose, self.lines = folder, verbose, []
        self.rule("cxx", f"{' '.join(cxx)} -MMD -MF $out.d $flags -c $in -o $out")
        self.rule("link", f"{' '.join(cxx)} -shared $in -o $out $flags", deps=False)
        if nvcc:
            self.rule("nvlink", f"{nvcc} -shared $in -o $out $flags", deps=False)
            self.rule("nvcc", f"{nvcc} -MMD -MF $out.d $flags -c $in -o $out")

    def rule(self, name: str, command: str, deps: bool = True) -> None:
        """Add a rule; with `deps` its command writes the headers that it read to `$out.d`."""
        self.lines += [f"rule {name}", f"  command = {command}"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if deps else []

    def build(self, rule: str, source: list[str], target: str, flags: list[str]) -> str:
        """Add a step that makes `target` from `source`, and return `target`."""
        escaped = [str(s).replace("$", "$$").replace(" ", "$ ").replace(":", "$:") for s in [target, *source]]
        self.lines += [f"build {escaped[0]}: {rule} {' '.join(escaped[1:])}", f"  flags = {' '.join(flags)}"]
        return target

    def run(self, targets: list[str]) -> bool:
        """Make the targets, and go on after one that fails. Return whether all were made.

        What ninja prints goes where this process prints. pip shows that to nobody unless asked (-v), so a build of
        more than a few seconds also tells the terminal how far it is.
        """
        command = self._command(targets)
        if sys.stdout.isatty():
            return subprocess.run(command, cwd=self.folder).returncode == 0
        since = time.monotonic()
        with subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as p:
            assert p.stdout is not None
            for line in p.stdout:
                print(line, end="", flush=True)
                done = re.match(r"\[(\d+)/(\d+)\]", line)
                if done and time.monotonic() - since > QUIET:
                    since = time.monotonic()
                    tell_terminal(f"lora_kernels: {done[1]} of {done[2]} steps of the build are done")
        return p.returncode == 0

    def fault(self, targets: list[str]) -> str:
        """Return what is printed where the targets cannot be made, and "" where they can."""
        done = subprocess.run(
            self._command(targets), cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        said = done.stdout.replace("ninja: build stopped: subcommand failed.", "")
        return "" if done.returncode == 0 else said or f"exit status {done.returncode}"

    def _command(self, targets: list[str]) -> list[str]:
        """Write the file, and return the command that makes the targets."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        return [*command, "-k", "0", *jobs, *(["-v"] if self.verbose else []), *targets]
