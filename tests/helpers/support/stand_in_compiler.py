"""A compiler that compiles nothing, for tests of the build."""

from __future__ import annotations

import stat
from pathlib import Path


def stand_in(folder: Path, refuses: str = "", real: str = "/bin/true") -> str:
    """Write a compiler that refuses the words of a pattern of the shell as gcc does. It asks g++ where the source is a
    probe; for others it writes an empty file, and the words of the command beside it, or is `real`."""
    path = folder / "stand-in-c++"
    path.write_text(
        f"""#!/bin/bash
for word in "$@"; do case "$word" in
  {refuses or "nothing"}) echo "g++: error: unrecognized command line option '$word'" >&2; exit 1;;
  *probe.cpp) probe=1;;
esac; done
[ "$probe" ] || [ "$1" = --version ] && exec g++ "$@"
words="$*"
while [ $# -gt 0 ]; do case "$1" in -o) out=$2;; -MF) : > "$2";; esac; shift; done
: > "$out"; echo "$words" >> "$(dirname "$0")/words"; {real}
"""
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)
