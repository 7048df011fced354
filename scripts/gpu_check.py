"""Build, test, watch, endure and measure on a machine with an NVIDIA GPU and no network, within 9 minutes.

    scripts/gpu_check.sh OUT_DIR [--only build,device,tests,sanitizer,endurance,bench] [--peer NAME=PATH] ...

Every section has its own time; one that fails or runs out of it does not stop the next. OUT_DIR gets at most 8 files,
none above 16 MB: check.json, log.txt, and the bench's JSON and pictures. A table comes last; exit status 1 where a
section failed. ``--device cpu`` tries the whole of it on a machine without a GPU.
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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 525.0
MAX_FILES, MAX_BYTES = 8, 16 * 2**20
LOG_BYTES = 400_000
"""Of a command's output this much is kept: the first fifth and the end."""
BACKENDS = ("cuda", "triton")
BROKEN = re.compile(
    r"illegal memory access|unspecified launch failure|misaligned address|illegal instruction|\+ Timeout \+"
    r"|worker '\w+' crashed"
)
"""What a log says when a back-end's kernels hang, or take the CUDA context with them: it is not called again."""


@dataclass(frozen=True)
class Command:
    """One process. Of a back-end: what its log says decides whether that is called again."""

    argv: Sequence[str]
    backend: str | None = None
    seconds: float | None = None
    """Less than the section has."""


@dataclass
class Check:
    """One run of the whole."""

    out: Path
    device: str = "cuda"
    peers: Sequence[str] = ()
    started: float = field(default_factory=time.monotonic)
    broken: set[str] = field(default_factory=set)
    total: float = TOTAL_SECONDS

    def left(self) -> float:
        return self.total - (time.monotonic() - self.started)

    def backends(self) -> list[str]:
        names = BACKENDS if self.device == "cuda" else ("cpu", "eager")
        return [name for name in names if name not in self.broken]


@dataclass(frozen=True)
class Section:
    """`commands(check, seconds)` is a list of steps, run one after the other; the commands of a step run at once. Where
    `first`, the steps are ways to the same end, and the first that works ends the section."""

    name: str
    seconds: float
    """At most, but for the last of those that run: it may take all that is left."""
    commands: Callable[[Check, float], list[list[Command]]]
    first: bool = False


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def build(check: Check, seconds: float) -> list[list[Command]]:
    in_place = python("setup.py", "build_ext", "--inplace")
    steps = [in_place, python("-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", ".")]
    if check.device == "cpu":
        return [[Command(["env", "LORA_KERNELS_CUDA=0", *in_place])]]
    return [[Command(["env", "LORA_KERNELS_CUDA=1", "LORA_KERNELS_REQUIRE_NATIVE=1", *step])] for step in steps]


def device(check: Check, seconds: float) -> list[list[Command]]:
    steps = [[Command(python("-m", "lora_kernels", "doctor"))]]
    if check.device == "cuda":
        steps.insert(0, [Command(["nvidia-smi"])])
    return steps


def tests(check: Check, seconds: float) -> list[list[Command]]:
    """The suite without the GPU's tests, and the GPU's by back-end, at once: one that hangs takes no other with it."""
    workers = importlib.util.find_spec("xdist") is not None and (os.cpu_count() or 1) >= 8
    alike = [
        "-p",
        "no:cacheprovider",
        "--durations=10",
        *(["--timeout-method=thread"] if check.device == "cuda" else []),
    ]

    def pytest(jobs: int, *words: str) -> list[str]:
        return python("-m", "pytest", *words, *alike, *(["-n", str(jobs)] if workers else []))

    gpu = [
        Command(
            pytest(6 if name == "triton" else 2, "tests/test_gpu.py", "--device", check.device, "--backend", name),
            backend=name,
        )
        for name in check.backends()
    ]
    if check.device == "cpu":
        return [gpu]
    return [[*gpu, Command(pytest(6, "tests", "-m", "not gpu"))]]


def sanitizer(check: Check, seconds: float) -> list[list[Command]]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None or check.device != "cuda":
        return []
    return [
        [
            Command([tool, "--tool", name, "--error-exitcode", "9", *python("scripts/gpu_small.py", backend)])
            for name in ("memcheck", "racecheck", "synccheck")
            for backend in check.backends()
        ]
    ]


def endurance(check: Check, seconds: float) -> list[list[Command]]:
    calls, replays = ("10000", "1000") if check.device == "cuda" else ("10", "0")
    words = ["--device", check.device, "--calls", calls, "--replays", replays, "--seconds", f"{0.6 * seconds:.0f}"]
    return [
        [
            Command(python("-m", "lora_kernels.bench.endurance", *words, "--backend", name), backend=name)
            for name in check.backends()
        ]
    ]


def bench(check: Check, seconds: float) -> list[list[Command]]:
    """The Llama suite with most of the time, then the sweeps. Not of `eager`: its dropout takes a hundred times the
    rest, and without it `addmm_` is the same."""

    left_out = () if check.device == "cpu" else ("eager",)

    def one(name: str, share: float, *words: str) -> Command:
        out = ["--device", check.device, "--out", str(check.out / f"{name}.json"), "--plot"]
        limits = [
            "--seconds",
            f"{0.75 * share * seconds:.0f}",
            *(w for b in sorted({*check.broken, *left_out}) for w in ("--without", b)),
        ]
        return Command(python("-m", "lora_kernels", "bench", *words, *out, *limits), seconds=share * seconds)

    if check.device == "cpu":
        return [[one("bench", 1.0, "--shapes", "tiny", "--rounds", "2")]]
    peers = [word for peer in check.peers for word in ("--peer", peer)]
    return [
        [one("hopper", 0.72, "--suite", "hopper", "--rounds", "9", *peers)],
        [one("sweep", 0.28, "--suite", "sweep", "--rounds", "7", "--peers", "basic")],
    ]


SECTIONS = (
    Section("build", 90, build, first=True),
    Section("device", 30, device),
    Section("tests", 160, tests),
    Section("sanitizer", 70, sanitizer),
    Section("endurance", 50, endurance),
    Section("bench", 240, bench),
)


def run_section(section: Section, check: Check, reserve: float, log: Path) -> dict[str, object]:
    """Its row: name, seconds, result ("ok", "nothing to do", or what failed). `reserve`: seconds to leave for what
    follows; with none to leave, the section may take all that is left."""
    start = time.monotonic()
    seconds = max(1.0, min(section.seconds, check.left() - reserve) if reserve else check.left())
    results: list[str] = []
    try:
        steps = section.commands(check, seconds)
        for step in steps:
            left = seconds - (time.monotonic() - start)
            results += [run_step(step, max(1.0, left), check, log, section.name)]
            if section.first and results[-1] == "ok":
                results = ["ok"]
                break
    except Exception as error:  # a section that fails in any way does not stop the next
        results.append(f"{type(error).__name__}: {error}")
    wrong = [result for result in results if result != "ok"]
    return {
        "section": section.name,
        "seconds": round(time.monotonic() - start, 1),
        "result": "; ".join(dict.fromkeys(wrong)) if wrong else "ok" if results else "nothing to do",
        "failed": bool(wrong),
    }


def run_step(step: Sequence[Command], seconds: float, check: Check, log: Path, title: str) -> str:
    """Runs the commands of a step at once, each into a file of its own, which the log then gets. "ok", or what
    failed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    started = []
    for i, command in enumerate(step):
        said = log.with_suffix(f".{title}.{i}")
        with said.open("wb") as file:
            try:
                process = subprocess.Popen(
                    command.argv,
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                file.write(f"{error}\n".encode())
                process = None
        started.append((command, process, said))
    start, wrong = time.monotonic(), []
    for command, process, said in started:
        limit = seconds if command.seconds is None else min(seconds, command.seconds)
        result = "cannot be started" if process is None else wait(process, limit - (time.monotonic() - start))
        text = trimmed(said.read_bytes())
        said.unlink()
        words = " ".join(shown(word, check) for word in command.argv)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n===== {title}: {words}\n===== {result}\n{text}\n")
        tail = "\n".join(text.strip().splitlines()[-12:])
        print(f"----- {title}: {words}: {result}\n{tail}", flush=True)
        if command.backend and (result.startswith(("out of time", "killed")) or BROKEN.search(text)):
            check.broken.add(command.backend)
            result += f" ({command.backend} is not called again)"
        if result != "ok":
            wrong.append(f"{command.backend or Path(command.argv[0]).name} {result}" if len(step) > 1 else result)
    return "; ".join(wrong) or "ok"


def wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    try:
        status = process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(3)
            except (subprocess.TimeoutExpired, ProcessLookupError):
                continue
        return "out of time"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return "ok" if status == 0 else f"exit status {status}"


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
    for path in [path for path in files if path not in small] + small[MAX_FILES:]:
        print(
            f"{path.name} is left out: {path.stat().st_size} bytes, file {MAX_FILES + 1} or later, or too large",
            flush=True,
        )
        path.unlink()


def table(rows: Sequence[dict[str, object]]) -> str:
    lines = [f"{'section':<12}{'seconds':>8}  result"]
    lines += [f"{row['section']:<12}{row['seconds']:>8}  {row['result']}" for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, sections: Sequence[Section] = SECTIONS) -> int:
    names = [section.name for section in sections]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--only", metavar="A,B", help=f"of {','.join(names)}; several by commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="as of lora_kernels bench")
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
        rows.append(run_section(section, check, reserve, log))
        print(f"===== {section.name}: {rows[-1]['result']}, {rows[-1]['seconds']} s\n", flush=True)
        (out / "check.json").write_text(json.dumps({"rows": rows, "broken": sorted(check.broken)}, indent=1) + "\n")
    keep_within_limits(out)
    print(table(rows), flush=True)
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
