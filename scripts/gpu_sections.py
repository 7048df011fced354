"""The sections of gpu_check.py: what each of them runs, and its share of the time."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

from gpu_run import Check, Command

QUICK = (
    "package/test_import.py",
    "package/test_build.py",
    "tools/test_doctor.py",
    "backends/cuda/test_cuda_backend.py",
)
"""Tests that need no GPU, but may find faults on such a machine that they find on no other."""

FIRST_SHAPES = ("llama-8b-q-2048-r16", "llama-8b-q-8192-r16", "llama-8b-up-8192-r16")
"""The layers of the section `numbers`."""

WATCHED = "test_runs_are_bit_identical"
"""The tests that compute-sanitizer watches: it slows a kernel down by a factor of ten to a thousand."""


@dataclass(frozen=True)
class Section:
    """A part of the check, with its share of the time and its commands."""

    name: str
    share: float
    """The seconds that it usually wants. If all sections that are asked for want more or less than there is, each gets
    its part, and what one leaves goes to those after it."""
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
    """Describe the machine. Without a GPU no further section runs."""
    doctor = Command(python("-m", "lora_kernels", "doctor"))
    if check.device == "cpu":
        return [[doctor]]
    ask = "import sys, torch; print(torch.__version__, n := torch.cuda.device_count()); sys.exit(n == 0)"
    return [[Command(["nvidia-smi"]), doctor, Command(python("-c", ask), label="torch", vital="torch sees no GPU")]]


def verify(check: Check, seconds: float) -> list[list[Command]]:
    """Judge every class of kernels in a process of its own, and time what is right. Every verdict and every time is in
    the file of evidence as soon as it is known, and later sections read that file."""
    return _verify(check, seconds, "--quick")


def tune(check: Check, seconds: float) -> list[list[Command]]:
    """Measure plans of the kernels too, in more sizes, and keep the fastest."""
    return _verify(check, seconds, "--tune")


def _verify(check: Check, seconds: float, *words: str) -> list[list[Command]]:
    if check.device == "cpu":
        return []
    jobs = max(1, min(8, (os.cpu_count() or 1) // 2))  # what takes long is to compile
    limits = ["--seconds", f"{0.85 * seconds:.0f}", "--timeout", f"{min(45.0, 0.4 * seconds):.0f}", "--jobs", str(jobs)]
    out = ["--device", "cuda", "--out", str(check.evidence)]
    return [[Command(python("-m", "lora_kernels", "verify", *words, *out, *limits), label="verify")]]


def numbers(check: Check, seconds: float) -> list[list[Command]]:
    """Time a few layers beside the frozen layer, `addmm_` and PEFT."""
    shapes = FIRST_SHAPES if check.device == "cuda" else ("tiny",)
    return [[_bench(check, "numbers", seconds, "--shapes", *shapes, "--rounds", "5", "--peers", "basic")]]


def suite(check: Check, seconds: float) -> list[list[Command]]:
    """Time the projections of Llama 3.1 beside all peers: this is the evidence that README shows."""
    if check.device == "cpu":
        return []
    peers = [word for peer in check.peers for word in ("--peer", peer)]
    return [[_bench(check, "llama", seconds, "--suite", "llama", "--rounds", "7", *peers)]]


def sweep(check: Check, seconds: float) -> list[list[Command]]:
    """Time one layer over its numbers of rows and its ranks, for the picture of the roofline."""
    if check.device == "cpu":
        return []
    return [[_bench(check, "sweep", seconds, "--suite", "sweep", "--rounds", "7", "--peers", "basic")]]


def _bench(check: Check, name: str, seconds: float, *words: str) -> Command:
    """Return a run of the bench. If a kernel hangs, it ends, and another process goes on without that kernel. `eager`
    is left out on a GPU: its dropout takes very long, and without dropout `addmm_` is the same."""
    left_out = check.broken() | ({"eager"} if check.device == "cuda" else set())
    out = ["--device", check.device, "--out", str(check.out / f"{name}.json")]
    limits = ["--seconds", f"{0.8 * seconds:.0f}", "--stuck", "40", "--resume"]
    limits += [word for each in sorted(left_out) for word in ("--without", each)]
    return Command(python("-m", "lora_kernels", "bench", *words, *out, *limits), label=name, again=6)


def tests(check: Check, seconds: float) -> list[list[Command]]:
    """Run the GPU's tests, a process for each back-end, and some other tests, so that a hang stops only its process."""
    workers = importlib.util.find_spec("xdist") is not None and (os.cpu_count() or 1) >= 8
    alike = ["-vv", "-p", "no:cacheprovider", "--durations=10", "--tb=short"]
    alike += ["--timeout-method=thread"] if check.device == "cuda" else []

    def pytest(jobs: int, *words: str) -> list[str]:
        return ["env", "OMP_NUM_THREADS=2", *python("-m", "pytest", *words, *alike), *(["-n", str(jobs)] * workers)]

    gpu = [
        Command(pytest(4, "tests/gpu", "--device", check.device, "--backend", name), backend=name)
        for name in check.backends()
    ]
    if check.device == "cpu":
        return [gpu]
    quick = [f"tests/{name}" for name in QUICK]
    return [[*gpu, Command(pytest(3, *quick, "-m", "not gpu"), label="without the GPU")]]


def sanitizer(check: Check, seconds: float) -> list[list[Command]]:
    """Run compute-sanitizer over a few of the GPU's tests. It knows nothing of wgmma's own ordering, so what it says of
    `cuda` and of Triton on Hopper may be a false alarm."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None or check.device != "cuda":
        return []
    watched = python(
        "-m", "pytest", "tests/gpu", "-k", WATCHED, "-p", "no:cacheprovider", "-p", "no:timeout", "--backend"
    )
    return [
        [
            Command([tool, "--tool", name, "--error-exitcode", "9", *watched, backend], label=f"{name} {backend}")
            for name in ("memcheck", "racecheck", "synccheck")
            for backend in check.backends()
        ]
    ]


def endurance(check: Check, seconds: float) -> list[list[Command]]:
    """Make thousands of random calls, each of them judged."""
    calls, replays = ("10000", "1000") if check.device == "cuda" else ("10", "0")
    words = ["--device", check.device, "--calls", calls, "--replays", replays, "--seconds", f"{0.6 * seconds:.0f}"]
    words += ["--stuck", "20"]
    return [
        [
            Command(python("-m", "benchmarks.endurance", *words, "--backend", name), backend=name)
            for name in check.backends()
        ]
    ]


BUILD = Section("build", 120, build, first=True)
SECTIONS = (
    Section("device", 15, device),
    Section("verify", 110, verify),
    Section("numbers", 60, numbers),
    Section("tests", 60, tests),
    Section("tune", 120, tune),
    Section("suite", 240, suite),
    Section("sweep", 60, sweep),
    Section("sanitizer", 60, sanitizer),
    Section("endurance", 40, endurance),
)
USUAL = ("device", "verify", "numbers", "tests")
"""The sections that run if none are named."""
