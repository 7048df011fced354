"""What a build has left out, and why: told to the person who builds, and kept in the package for who uses it.

`lora_kernels/core/built.py` reads the file.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path

NAME = "_built.json"
TERMINAL = "/dev/tty"


@dataclass
class Record:
    """What is kept of a build. A module that was built has the reason ""."""

    compiler: str = ""
    modules: dict[str, str] = field(default_factory=dict)
    """Why each native module was not built."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why each instruction set of the processor's family was not compiled."""

    def write(self, folder: Path) -> None:
        """Write the file into the folder of the package."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"platform": sysconfig.get_platform(), **asdict(self)}, indent=1)
        (folder / NAME).write_text(text + "\n")


def tell(text: str) -> None:
    """Print to the log of the build, and to the terminal where that log is not shown there: pip keeps it to itself
    unless it fails or is asked (-v)."""
    print(text, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        tell_terminal(text)


def tell_terminal(text: str) -> None:
    """Print to the terminal of this process, if it has one."""
    try:
        with open(TERMINAL, "w") as terminal:
            terminal.write(f"\n{text}\n")  # the first line break ends the line in which pip draws its spinner
    except OSError:
        pass
