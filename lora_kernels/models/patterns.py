"""The check of a file's regular expressions, before they are used.

A regular expression of a few characters can keep Python's ``re`` busy for ever, in C code that no other thread can
interrupt. So every pattern with a repetition or a group is first tried in a process of its own, with a time limit. The
patterns stay those of Python's ``re``, with everything that people write for it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Mapping

from lora_kernels.models.targets import is_literal

CPU_SECONDS = 1
"""The processor time that the patterns of a file may take for all names."""
_WALL_SECONDS = 20
_MEMORY = 2 << 30
_MOST_MATCHES = 30_000_000
"""Patterns times names. So many literal ones take about half a minute."""
_MOST_EXPRESSIONS = 10_000
"""Patterns that are compiled, which takes about 0.2 ms for each."""
_TRIAL = """
import json, re, resource, sys
for kind, most in zip((resource.RLIMIT_CPU, resource.RLIMIT_AS), map(int, sys.argv[1:])):
    own = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if own == resource.RLIM_INFINITY else min(most, own), own))
patterns, names = json.load(sys.stdin)
for written, used in patterns:
    try:
        re.compile(written)
        compiled = re.compile(used)
    except Exception as error:
        sys.exit(f"{written!r:.200} is no regular expression ({error})")
    for name in names:
        compiled.fullmatch(name)
        compiled.match(name)
print("done")
"""


class TooSlow(ValueError):
    """Patterns took longer than `CPU_SECONDS`."""


def check(patterns: Mapping[str, str], names: Collection[str]) -> None:
    """Raise ValueError unless each pattern is a regular expression that is matched with all names in bounded time.

    A pattern without repetitions and groups takes a time that is proportional to its length, and is not tried. Others
    run in an isolated Python process, which takes about 20 ms.

    Args:
        patterns: the patterns as they are written, and as they are used.
        names: the names that they are matched with.

    Raises:
        TooSlow: matching takes more than `CPU_SECONDS`.
        ValueError: a pattern is no regular expression; no process can be started.
    """
    if len(patterns) * len(names) > _MOST_MATCHES:
        raise TooSlow(f"{len(patterns):,} patterns for {len(names):,} names are too many")
    expressions = {written: used for written, used in patterns.items() if not is_literal(used)}
    if len(expressions) > _MOST_EXPRESSIONS:
        raise TooSlow(f"{len(expressions):,} regular expressions are too many")
    tried = []
    for written, used in expressions.items():
        if any(each in written for each in "*+?{("):
            tried.append((written, used))
        else:
            _compile(written, used)
    if not tried:
        return
    command = [sys.executable, "-I", "-S", "-c", _TRIAL, str(CPU_SECONDS), str(_MEMORY)]
    try:
        done = subprocess.run(
            command, input=json.dumps([tried, [*names]]).encode(), capture_output=True, timeout=_WALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise TooSlow(f"they take more than {_WALL_SECONDS} s") from None
    except OSError as error:
        raise ValueError(f"they cannot be tried, because {sys.executable!r} does not start ({error})") from error
    if done.stdout.strip() == b"done":
        return
    # At its limit the kernel ends the process. A program that ignores SIGCHLD sees 0 for every end of a process.
    if done.returncode <= 0:
        raise TooSlow(f"they take more than {CPU_SECONDS} s of processor time with the names of this model")
    raise ValueError(done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:500])


def _compile(*patterns: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{patterns[0]!r:.200} is no regular expression ({error})") from None
