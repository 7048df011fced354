"""Build, test, watch, endure and measure on a machine with an NVIDIA GPU and no network, within 9 minutes.

    scripts/gpu_check.sh OUT_DIR [--only build,device,smoke,tests,sanitizer,endurance,bench] [--peer NAME=PATH] ...

Every section has its own time. A section that fails, or runs out of time, does not stop the next one. Whatever may hang
runs in a process of its own, with a time limit: each smoke test is one, and the bench ends its process where a kernel
hangs and goes on without that kernel in another one.

OUT_DIR gets at most 8 files, none above 16 MB: check.json and log.txt, which are written as things end, running.txt
while they run, and the bench's JSON and pictures. A table comes last. The exit status is 1 where a section failed.
``--device cpu`` is a dry run on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_smoke import CASES

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 525.0
MAX_FILES, MAX_BYTES = 8, 16 * 2**20
LOG_BYTES = 200_000
"""How much of a command's output the log keeps: the first fifth and the end. All together stay below MAX_BYTES."""
GRACE = ((signal.SIGINT, 4.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0))
"""The signals for a command that is out of time, and the seconds after each. At SIGINT pytest shows its failures."""
STUCK = 3
"""The exit status of a process that ended because a kernel hung or broke the GPU's context, and whose work can go on in
another process: `lora_kernels.testing.watch.STUCK`."""
BACKENDS = ("cuda", "triton")
BROKEN = re.compile(r"illegal memory access|unspecified launch failure|misaligned address|illegal instruction")
"""The messages of a kernel that broke the CUDA context."""


@dataclass(frozen=True)
class Command:
    """A process to run."""

    argv: Sequence[str]
    backend: str | None = None
    seconds: float | None = None
    """A limit below that of the section."""
    label: str | None = None
    """Its name in the table. The default is its back-end or its program."""
    decides: bool = False
    """A back-end is not called again if all commands of a step that decide about it hang or break the GPU's context."""
    vital: str | None = None
    """If the command exits with 1, no further section runs, for this reason."""
    again: int = 0
    """How often the same command is run again if it ends with `STUCK` or is killed."""

    @property
    def name(self) -> str:
        return self.label or self.backend or Path(self.argv[0]).name


@dataclass
class Check:
    """The state of one run of this script."""

    out: Path
    device: str = "cuda"
    peers: Sequence[str] = ()
    started: float = field(default_factory=time.monotonic)
    broken: set[str] = field(default_factory=set)
    total: float = TOTAL_SECONDS
    hopeless: str | None = None
    """The reason why no further section runs, if there is one."""

    def left(self) -> float:
        return self.total - (time.monotonic() - self.started)

    def backends(self) -> list[str]:
        names = BACKENDS if self.device == "cuda" else ("cpu", "eager")
        return [name for name in names if name not in self.broken]


class Running:
    """A command that was started, with its output file, its deadline and its result."""

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
        """Return whether the command has ended. Ends it when its time is over; starts it again where `again` allows."""
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
    """Write the whole output to the log, and its end to the terminal."""
    words = " ".join(shown(word, check) for word in command.argv)
    file.write(f"\n===== {title}: {words}\n===== {result}\n{text}\n")
    lines = 12 if not command.decides else 1 if result == "ok" else 4
    tail = "\n".join(text.strip().splitlines()[-lines:])
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


def keep_within_limits(out: Path) -> None:
    """Leave at most MAX_FILES files of at most MAX_BYTES in `out`. Files that are too large go first (text is cut
    instead), then the least important ones."""
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


QUICK = (
    "package/test_import.py",
    "tools/test_doctor.py",
    "package/test_build.py",
    "ops/test_errors.py",
    "ops/test_equation.py",
    "core/test_dropout.py",
    "ops/test_lora_linear.py",
    "nn/test_linear.py",
    "backends/cuda/test_cuda_backend.py",
    "backends/cuda/test_sm90_schedule.py",
)
"""Tests that need no GPU, but may find faults on such a machine that they find on no other."""


@dataclass(frozen=True)
class Section:
    """A part of the check, with its time and its commands."""

    name: str
    seconds: float
    """The most it may take. The last section that runs may take all the time that is left."""
    commands: Callable[[Check, float], list[list[Command]]]
    """Called with the check and the seconds. Returns steps, which run one after the other; the commands of a step run
    at the same time."""
    first: bool = False
    """Whether the steps are ways to the same end, of which the first that works ends the section."""


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def build(check: Check, seconds: float) -> list[list[Command]]:
    """Build with the CUDA part. Where that fails, build without it, so that the rest can still be measured."""
    in_place = python("setup.py", "build_ext", "--inplace")
    required = "LORA_KERNELS_REQUIRE_NATIVE=1"
    without = Command(["env", "LORA_KERNELS_CUDA=0", required, *in_place], label="without CUDA")
    if check.device == "cpu":
        return [[without]]
    whole = Command(["env", "LORA_KERNELS_CUDA=1", required, *in_place], seconds=0.75 * seconds)
    return [[whole], [without]]


def device(check: Check, seconds: float) -> list[list[Command]]:
    doctor = Command(python("-m", "lora_kernels", "doctor"))
    if check.device == "cpu":
        return [[doctor]]
    ask = "import sys, torch; print(torch.__version__, n := torch.cuda.device_count()); sys.exit(n == 0)"
    return [[Command(["nvidia-smi"])], [doctor], [Command(python("-c", ask), vital="torch sees no GPU")]]


def smoke(check: Check, seconds: float) -> list[list[Command]]:
    """Call every kernel once, all at the same time, each in a process of its own: which of them work at all?"""
    cases = [(backend, name) for backend in check.backends() for name in CASES if CASES[name].runs_on(backend)]
    if check.device == "cpu":
        cases = [(backend, "small") for backend in check.backends()]
    return [
        [
            Command(
                python("scripts/gpu_smoke.py", backend, check.device, name),
                backend,
                label=f"{backend} {name}",
                decides=True,
            )
            for backend, name in cases
        ]
    ]


def tests(check: Check, seconds: float) -> list[list[Command]]:
    """Run the GPU's tests, a process for each back-end, and some other tests, so that a hang stops only its process."""
    workers = importlib.util.find_spec("xdist") is not None and (os.cpu_count() or 1) >= 8
    alike = ["-vv", "-p", "no:cacheprovider", "--durations=10", "--tb=short"]
    alike += ["--timeout-method=thread"] if check.device == "cuda" else []

    def pytest(jobs: int, *words: str) -> list[str]:
        return ["env", "OMP_NUM_THREADS=2", *python("-m", "pytest", *words, *alike), *(["-n", str(jobs)] * workers)]

    gpu = [
        Command(
            pytest(8 if name == "triton" else 4, "tests/gpu", "--device", check.device, "--backend", name),
            backend=name,
        )
        for name in check.backends()
    ]
    if check.device == "cpu":
        return [gpu]
    quick = [f"tests/{name}" for name in QUICK]
    return [[*gpu, Command(pytest(3, *quick, "-m", "not gpu"), label="without the GPU")]]


def sanitizer(check: Check, seconds: float) -> list[list[Command]]:
    """Run compute-sanitizer. A broken back-end is checked with memcheck too, which may say why it is broken."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None or check.device != "cuda":
        return []
    return [
        [
            Command(
                [tool, "--tool", name, "--error-exitcode", "9", *python("scripts/gpu_smoke.py", backend)],
                label=f"{name} {backend}",
            )
            for name in ("memcheck", "racecheck", "synccheck")
            for backend in BACKENDS
            if name == "memcheck" or backend not in check.broken
        ]
    ]


def endurance(check: Check, seconds: float) -> list[list[Command]]:
    calls, replays = ("10000", "1000") if check.device == "cuda" else ("10", "0")
    words = ["--device", check.device, "--calls", calls, "--replays", replays, "--seconds", f"{0.6 * seconds:.0f}"]
    words += ["--stuck", "20"]
    return [
        [
            Command(python("-m", "benchmarks.endurance", *words, "--backend", name), backend=name)
            for name in check.backends()
        ]
    ]


def bench(check: Check, seconds: float) -> list[list[Command]]:
    """Run the Llama suite with most of the time, then the sweeps. `eager` is left out: its dropout takes a hundred
    times as long as everything else, and without dropout `addmm_` is the same."""
    left_out = () if check.device == "cpu" else ("eager",)

    def one(name: str, share: float, *words: str) -> Command:
        out = ["--device", check.device, "--out", str(check.out / f"{name}.json"), "--plot"]
        limits = ["--seconds", f"{0.75 * share * seconds:.0f}", "--stuck", "40", "--resume"]
        limits += [word for name in sorted({*check.broken, *left_out}) for word in ("--without", name)]
        argv = python("-m", "lora_kernels", "bench", *words, *out, *limits)
        return Command(argv, seconds=share * seconds, label=name, again=6)

    if check.device == "cpu":
        return [[one("bench", 1.0, "--shapes", "tiny", "--rounds", "2")]]
    peers = [word for peer in check.peers for word in ("--peer", peer)]
    return [
        [one("hopper", 0.72, "--suite", "hopper", "--rounds", "9", *peers)],
        [one("sweep", 0.28, "--suite", "sweep", "--rounds", "7", "--peers", "basic")],
    ]


SECTIONS = (
    Section("build", 120, build, first=True),
    Section("device", 40, device),
    Section("smoke", 60, smoke),
    Section("tests", 100, tests),
    Section("sanitizer", 55, sanitizer),
    Section("endurance", 40, endurance),
    Section("bench", 240, bench),
)


def run_section(section: Section, check: Check, reserve: float, log: Path) -> dict[str, object]:
    """Run a section and return its row of the table: name, seconds, and "ok", "nothing to do" or what failed.

    `reserve` is how many seconds to leave for later sections. If it is 0, the section may take all that is left.
    """
    start = time.monotonic()
    seconds = max(1.0, min(section.seconds, check.left() - reserve) if reserve else check.left())
    results: list[str] = []
    try:
        steps = section.commands(check, seconds)
        for step in steps:
            left = seconds - (time.monotonic() - start)
            results += [run_step(step, max(1.0, left), check, log, section.name)]
            if section.first and results[-1] == "ok":
                if step is steps[-1] and len(steps) > 1:
                    results[-1] = f"at last {step[0].name}"
                else:
                    results = ["ok"]
                break
    except Exception as error:  # no failure of a section may stop the next one
        results.append(f"{type(error).__name__}: {error}")
    wrong = [result for result in results if result != "ok"]
    return {
        "section": section.name,
        "seconds": round(time.monotonic() - start, 1),
        "result": "; ".join(dict.fromkeys(wrong)) if wrong else "ok" if results else "nothing to do",
        "failed": bool(wrong),
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    lines = [f"{'section':<12}{'seconds':>8}  result"]
    lines += [f"{row['section']:<12}{row['seconds']:>8}  {row['result']}" for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, sections: Sequence[Section] = SECTIONS) -> int:
    names = [section.name for section in sections]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--only", metavar="A,B", help=f"sections to run, with commas: {','.join(names)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH", help="a peer for lora_kernels bench"
    )
    args = parser.parse_args(argv)
    only = names if args.only is None else args.only.split(",")
    unknown = [name for name in only if name not in names]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: the sections are {', '.join(names)}")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"{args.out} is not empty: its files would count among the {MAX_FILES}")
    check = Check(out, args.device, args.peer)
    chosen = [section for section in sections if section.name in only]
    log = out / "log.txt"
    log.touch()
    rows: list[dict[str, object]] = []
    for i, section in enumerate(chosen):
        reserve = 0.5 * sum(later.seconds for later in chosen[i + 1 :])
        if check.hopeless:
            not_run = {"seconds": 0.0, "result": f"not run: {check.hopeless}", "failed": True}
            rows.append({"section": section.name} | not_run)
        else:
            rows.append(run_section(section, check, reserve, log))
        print(f"===== {section.name}: {rows[-1]['result']}, {rows[-1]['seconds']} s\n", flush=True)
        (out / "check.json").write_text(json.dumps({"rows": rows, "broken": sorted(check.broken)}, indent=1) + "\n")
        keep_within_limits(out)  # after each section: the end may never come
    print(table(rows), flush=True)
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
