"""How gpu_check runs commands: at once, each with its time, what they say kept within limits as they end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 525.0
MAX_FILES, MAX_BYTES = 8, 16 * 2**20
LOG_BYTES = 200_000
"""Of a command's output this much is kept: the first fifth and the end. All of them together stay below MAX_BYTES."""
GRACE = ((signal.SIGINT, 4.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0))
"""What is sent to a command that is out of time, and how long it then has: at SIGINT pytest shows its failures."""
STUCK = 3
"""`lora_kernels.testing.watch.STUCK`: the exit status of a process that ended because a kernel hung or broke the GPU's
context, and can go on in another process."""
BACKENDS = ("cuda", "triton")
BROKEN = re.compile(r"illegal memory access|unspecified launch failure|misaligned address|illegal instruction")
"""What a log says when kernels take the CUDA context with them."""


@dataclass(frozen=True)
class Command:
    """One process."""

    argv: Sequence[str]
    backend: str | None = None
    seconds: float | None = None
    """Less than the section has."""
    label: str | None = None
    """What it is called in the table, where not by its back-end or program."""
    decides: bool = False
    """A back-end of which all such commands of a step hang or break the GPU's context is not called again."""
    vital: str | None = None
    """Where it exits with 1, no further section is run, for this reason."""
    again: int = 0
    """How often it is run again, the same words, where it ends with `STUCK` or is killed."""

    @property
    def name(self) -> str:
        return self.label or self.backend or Path(self.argv[0]).name


@dataclass
class Check:
    """One run of the whole."""

    out: Path
    device: str = "cuda"
    peers: Sequence[str] = ()
    started: float = field(default_factory=time.monotonic)
    broken: set[str] = field(default_factory=set)
    total: float = TOTAL_SECONDS
    hopeless: str | None = None
    """Why no further section is run."""

    def left(self) -> float:
        return self.total - (time.monotonic() - self.started)

    def backends(self) -> list[str]:
        names = BACKENDS if self.device == "cuda" else ("cpu", "eager")
        return [name for name in names if name not in self.broken]


class Running:
    """A command that was started: its output in a file of its own, its time, what became of it."""

    def __init__(self, command: Command, seconds: float, said: Path) -> None:
        self.command, self.said, self.again = command, said, command.again
        self.deadline = time.monotonic() + (seconds if command.seconds is None else min(seconds, command.seconds))
        self.grace = list(GRACE)
        self.result: str | None = None
        self.file = said.open("wb")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes] | None:
        self.started = time.monotonic()
        said_by = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        try:
            return subprocess.Popen(
                self.command.argv,
                cwd=ROOT,
                env=os.environ | said_by | {"PYTHONPATH": paths},
                stdout=self.file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self.file.write(f"{error}\n".encode())
            self.result = "cannot be started"
            return None

    def look(self) -> bool:
        """Whether it has ended; ends it where its time is over, and starts it again where that is what is wanted."""
        if self.process is None or self.result is not None:
            return True
        status, now = self.process.poll(), time.monotonic()
        out_of_time = len(self.grace) < len(GRACE)
        if status is None and now < self.deadline:
            return False
        if status is None and self.grace:
            number, seconds = self.grace.pop(0)
            _kill(self.process, number)
            self.deadline = now + seconds
            return False
        _kill(self.process, signal.SIGKILL)  # what it leaves behind
        if out_of_time or status is None:
            self.result = "out of time"
        elif self.again and (status == STUCK or status < 0) and self.deadline - now > 15:
            self.again -= 1
            self.file.write(f"\n===== {_ended(status)}: run again\n".encode())
            self.file.flush()
            self.process = self._start()
            return self.process is None
        else:
            self.result = _ended(status)
        return True

    def text(self) -> str:
        self.file.flush()
        return trimmed(self.said.read_bytes())


def _ended(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return "ok" if status == 0 else f"exit status {status}"


def _kill(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return


def run_step(step: Sequence[Command], seconds: float, check: Check, log: Path, title: str) -> str:
    """Runs the commands of a step at once; the log gets the output of each as it ends. "ok", or what failed."""
    wrong: dict[int, str] = {}
    hopeless: dict[str, list[bool]] = {}
    with tempfile.TemporaryDirectory() as folder:
        running = {i: Running(command, seconds, Path(folder, str(i))) for i, command in enumerate(step)}
        shown_at = 0.0
        while running:
            for i, each in list(running.items()):
                if not each.look():
                    continue
                del running[i]
                text, result = each.text(), str(each.result)
                each.file.close()
                with log.open("a", encoding="utf-8") as file:
                    _tell(file, each.command, check, title, result, text)
                if each.command.decides and each.command.backend:
                    gone = result.startswith(("out of time", "killed")) or bool(BROKEN.search(text))
                    hopeless.setdefault(each.command.backend, []).append(gone)
                if result == "exit status 1" and each.command.vital:
                    check.hopeless = result = each.command.vital
                if result != "ok":
                    wrong[i] = f"{each.command.name} {result}" if len(step) > 1 else result
            if time.monotonic() - shown_at > 3:
                _show_running(check.out / "running.txt", list(running.values()), check, title)
                shown_at = time.monotonic()
            time.sleep(0.05)
    (check.out / "running.txt").unlink(missing_ok=True)
    broken = sorted(name for name, all_of_them in hopeless.items() if all(all_of_them))
    check.broken.update(broken)
    return "; ".join([*(wrong[i] for i in sorted(wrong)), *(f"{name} is not called again" for name in broken)]) or "ok"


def _tell(file: IO[str], command: Command, check: Check, title: str, result: str, text: str) -> None:
    """To the log all of it, to the terminal the end of it."""
    words = " ".join(shown(word, check) for word in command.argv)
    file.write(f"\n===== {title}: {words}\n===== {result}\n{text}\n")
    lines = 12 if not command.decides else 1 if result == "ok" else 4
    tail = "\n".join(text.strip().splitlines()[-lines:])
    print(f"----- {title}: {words}: {result}\n{tail}", flush=True)


def _show_running(path: Path, running: Sequence[Running], check: Check, title: str) -> None:
    """What a run that is cut off leaves of the commands that had not ended."""
    parts = []
    for each in running:
        words = " ".join(shown(word, check) for word in each.command.argv)
        tail = "\n".join(each.text().strip().splitlines()[-40:])
        parts.append(f"===== {title}: {words}\n===== for {time.monotonic() - each.started:.0f} s\n{tail}\n")
    path.write_text("\n".join(parts), encoding="utf-8")


def trimmed(said: bytes) -> str:
    """At most LOG_BYTES: the first fifth and the end."""
    if len(said) > LOG_BYTES:
        first = LOG_BYTES // 5
        said = (
            said[:first] + f"\n[... {len(said) - LOG_BYTES} bytes left out ...]\n".encode() + said[first - LOG_BYTES :]
        )
    return said.decode("utf-8", errors="replace")


def shown(word: str, check: Check) -> str:
    """A word of a command without the places of this machine."""
    if word == sys.executable:
        return "python"
    return word.replace(str(check.out), "OUT").replace(str(ROOT), ".")


def keep_within_limits(out: Path) -> None:
    """At most MAX_FILES files of at most MAX_BYTES: what is too large goes, then what is least asked for."""
    wanted = [
        "check.json",
        "log.txt",
        "hopper.json",
        "hopper.png",
        "sweep-roofline.png",
        "sweep.json",
        "hopper-roofline.png",
    ]
    files = [path for path in out.iterdir() if path.is_file()]
    small = [path for path in files if path.stat().st_size <= MAX_BYTES]
    small.sort(key=lambda path: (wanted.index(path.name) if path.name in wanted else len(wanted), path.name))
    too_large = [path for path in files if path not in small]
    for path in [path for path in too_large if path.suffix == ".txt"]:
        cut = path.read_bytes()
        path.write_bytes(cut[: MAX_BYTES // 4] + b"\n[... cut ...]\n" + cut[-MAX_BYTES // 2 :])
        too_large.remove(path)
        small.insert(0, path)
    for path in too_large + small[MAX_FILES:]:
        print(
            f"{path.name} is left out: {path.stat().st_size} bytes, file {MAX_FILES + 1} or later, or too large",
            flush=True,
        )
        path.unlink()
