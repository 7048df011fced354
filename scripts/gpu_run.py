"""Run the commands of gpu_check.py: several at a time, each with a time limit, and their output in a log."""

from __future__ import annotations

import functools
import json
import os
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
sys.path.insert(0, str(ROOT))

LOG_BYTES = 200_000
"""How much of a command's output the log keeps: the first fifth and the end."""
GRACE = ((signal.SIGINT, 4.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0))
"""The signals for a command that is out of time, and the seconds after each. At SIGINT pytest shows its failures."""
ENDING = sum(seconds for _, seconds in GRACE) + 2
"""The seconds that are kept back of the whole time, for ending the last command."""
STUCK = 3
"""The exit status of a process that ended because a kernel hung or broke the GPU's context, and whose work can go on in
another process: `lora_kernels.testing.watch.STUCK`."""
EVIDENCE = "LORA_KERNELS_EVIDENCE"
"""The variable that names the file of evidence to a process."""
TAIL = 16
"""How many lines of a command's output the terminal shows."""
BACKENDS = ("composite", "triton", "cuda")
"""The back-ends with kernels for a GPU, those that need least first."""
RIGHT = "right"
"""The verdict on a class of kernels that may be called: `lora_kernels.evidence.file.RIGHT`."""


@dataclass(frozen=True)
class Command:
    """A process to run."""

    argv: Sequence[str]
    backend: str | None = None
    seconds: float | None = None
    """A limit for this command, where it is to be shorter than that of the section."""
    label: str | None = None
    """The command's name in the table. The default is its back-end or its program."""
    vital: str | None = None
    """If the command exits with 1, no further section runs, for this reason."""
    again: int = 0
    """How often the same command is run again if it ends with `STUCK` or is killed."""

    @property
    def name(self) -> str:
        return self.label or self.backend or Path(self.argv[0]).name


@dataclass
class Check:
    """The state of one run of gpu_check.py."""

    out: Path
    total: float
    """The seconds that the whole check may take."""
    device: str = "cuda"
    peers: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """What the commands find in their environment beside this process's own."""
    started: float = field(default_factory=time.monotonic)
    hopeless: str | None = None
    """The reason why no further section runs, if there is one."""

    def left(self) -> float:
        """Return the seconds that are left for commands."""
        return self.total - ENDING - (time.monotonic() - self.started)

    @property
    def evidence(self) -> Path:
        """The file that `verify` writes its verdicts and times to."""
        return self.out / "evidence.json"

    def verdicts(self) -> dict[str, str]:
        """Return the verdict on every class of kernels that `verify` has judged, in this run or, with the same kernels,
        in an earlier one whose file of evidence the environment names."""
        earlier = [Path(name) for name in os.environ.get(EVIDENCE, "").split(":")]
        path = next((path for path in (self.evidence, *earlier) if path.is_file()), None)
        if path is None:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))["content"]
        if path != self.evidence and content["identity"]["sources"] != source_hash():
            return {}
        return {key: verdict["result"] for key, verdict in content["verdicts"].items()}

    def broken(self) -> set[str]:
        """Return the back-ends of which no class that was judged is right. They are not called again."""
        verdicts = self.verdicts()
        judged = {key.split()[0] for key in verdicts}
        return judged - {key.split()[0] for key, result in verdicts.items() if result == RIGHT}

    def backends(self) -> list[str]:
        """Return the back-ends that may still be called."""
        broken, names = self.broken(), BACKENDS if self.device == "cuda" else ("cpu", "eager")
        return [name for name in names if name not in broken]


@functools.cache
def source_hash() -> str:
    """Return the state of this checkout's kernels, as files of evidence name it."""
    from lora_kernels.evidence import identity  # torch takes seconds to import, and most runs do not need this

    return identity.source_hash()


class Running:
    """A command that was started, with its output file, its deadline and its result."""

    def __init__(self, command: Command, seconds: float, said: Path, environment: dict[str, str]) -> None:
        self.command, self.said, self.again, self.environment = command, said, command.again, environment
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
                env=os.environ | self.environment | said_by | {"PYTHONPATH": paths},
                stdout=self.file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self.file.write(f"{error}\n".encode())
            self.result = "cannot be started"
            return None

    def look(self) -> bool:
        """Return whether the command has ended. End it if its time is over, and start it again if `again` allows."""
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
        _kill(self.process, signal.SIGKILL)  # the children that it left behind
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
        """Return the output so far, as the log keeps it."""
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
    """Run the commands of a step at the same time and return "ok" or what failed. The log gets the output of each
    command as it ends."""
    wrong: dict[int, str] = {}
    environment = check.environment | ({EVIDENCE: str(check.evidence)} if check.evidence.exists() else {})
    with tempfile.TemporaryDirectory() as folder:
        running = {i: Running(command, seconds, Path(folder, str(i)), environment) for i, command in enumerate(step)}
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
                if result == "exit status 1" and each.command.vital:
                    check.hopeless = result = each.command.vital
                if result != "ok":
                    wrong[i] = f"{each.command.name} {result}" if len(step) > 1 else result
            if time.monotonic() - shown_at > 3:
                _show_running(check.out / "running.txt", list(running.values()), check, title)
                shown_at = time.monotonic()
            time.sleep(0.05)
    (check.out / "running.txt").unlink(missing_ok=True)
    return "; ".join(wrong[i] for i in sorted(wrong)) or "ok"


def _tell(file: IO[str], command: Command, check: Check, title: str, result: str, text: str) -> None:
    """Write the whole output to the log, and its end to the terminal."""
    words = " ".join(shown(word, check) for word in command.argv)
    file.write(f"\n===== {title}: {words}\n===== {result}\n{text}\n")
    tail = "\n".join(text.strip().splitlines()[-TAIL:])
    print(f"----- {title}: {words}: {result}\n{tail}", flush=True)


def _show_running(path: Path, running: Sequence[Running], check: Check, title: str) -> None:
    """Write the last output of the running commands, which is all that is left of them if this run is cut off."""
    parts = []
    for each in running:
        words = " ".join(shown(word, check) for word in each.command.argv)
        tail = "\n".join(each.text().strip().splitlines()[-40:])
        parts.append(f"===== {title}: {words}\n===== for {time.monotonic() - each.started:.0f} s\n{tail}\n")
    path.write_text("\n".join(parts), encoding="utf-8")


def trimmed(said: bytes) -> str:
    """Return at most LOG_BYTES of an output: the first fifth and the end."""
    if len(said) > LOG_BYTES:
        first = LOG_BYTES // 5
        said = (
            said[:first] + f"\n[... {len(said) - LOG_BYTES} bytes left out ...]\n".encode() + said[first - LOG_BYTES :]
        )
    return said.decode("utf-8", errors="replace")


def shown(word: str, check: Check) -> str:
    """Return a word of a command without the paths of this machine."""
    if word == sys.executable:
        return "python"
    return word.replace(str(check.out), "OUT").replace(str(ROOT), ".")
