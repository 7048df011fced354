"""Check and measure the kernels on a machine with an NVIDIA GPU and no network, within 9 minutes.

    scripts/gpu_check.sh OUT_DIR [--only build,device,smoke,tests,sanitizer,endurance,bench] [--peer NAME=PATH] ...

Every section has its own time. A section that fails, or runs out of time, does not stop the next one. Every command
is a process with a time limit (gpu_run.py), and each smoke test is such a command. If a kernel hangs, the bench ends
its process and continues without that kernel in another process.

OUT_DIR gets at most 8 files, none above 16 MB. check.json is written after each section, log.txt after each command,
and running.txt while commands run. The others are the bench's JSON and pictures. A table is printed at the end. The
exit status is 1 if a section failed.
``--device cpu`` is a dry run on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_run import BACKENDS, Check, Command, run_step
from gpu_smoke import CASES

MAX_FILES, MAX_BYTES = 8, 16 * 2**20
"""The limits on OUT_DIR. The log stays below MAX_BYTES, because `gpu_run` shortens every output."""


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
