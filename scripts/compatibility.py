"""Record which tests pass with the versions that are installed here, and write the tables of docs/compatibility.md.

    python scripts/compatibility.py --record [PYTEST ARGUMENT ...]   # runs the suite, writes a small JSON
    python scripts/compatibility.py --table                          # writes the tables from all JSONs
    python scripts/compatibility.py --check                          # exit status 1 if the page is stale

Without arguments for pytest the tests run that take no long time (``-m "not slow"``). The JSON lies in
benchmarks/results/compatibility/ and is named after the versions of Python, torch and PEFT, so that a later run with
the same three replaces it. A run that is interrupted, or in which no test ran, leaves no file.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import fnmatch
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from readme_tables import markdown
from update_readme import begin, between, end

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compatibility"
PAGE = ROOT / "docs" / "compatibility.md"
PACKAGES = (
    "torch", "triton", "peft", "transformers", "accelerate", "bitsandbytes", "trl", "lightning", "torchao", "hqq",
    "diffusers", "sentence-transformers", "safetensors", "numpy",
)  # fmt: skip
SHOWN = ("torch", "peft", "transformers", "accelerate", "bitsandbytes", "trl", "lightning", "torchao", "triton")
"""The packages that have a column in the table of environments."""
OUTCOMES = ("passed", "failed", "skipped")
BACKENDS = ("eager", "cpu", "composite", "triton", "cuda")

FEATURES: dict[str, tuple[str, ...]] = {
    "the equation, values and gradients": ("tests/ops/test_equation.py", "tests/ops/test_lora_linear.py"),
    "`FusedLoRALinear`, `apply_lora`": ("tests/nn/test_linear.py", "tests/models/test_inject*.py"),
    "`fuse` on PEFT's layers": ("tests/peft/test_fuse.py", "tests/peft/test_peft_*.py", "tests/peft/test_fp32*.py"),
    "PEFT's configuration, field by field": ("tests/peft/test_config_fields.py", "tests/peft/test_known_forwards.py"),
    "merging": ("tests/nn/test_merging.py", "tests/peft/test_merging*.py"),
    "adapter files": ("tests/models/test_adapters*.py", "tests/models/test_foreign.py", "tests/models/test_*file*.py"),
    "DoRA": ("tests/*/test_dora*.py", "tests/peft/test_bnb_dora.py"),
    "weights in 4 and 8 bits": ("tests/quant/*", "tests/nn/test_quantized*.py", "tests/ops/test_*quantised.py"),
    "bitsandbytes' layers": ("tests/peft/test_bnb_*.py", "tests/quant/test_bnb_bits.py"),
    "GPTQ, AWQ, HQQ, torchao and other bases": ("tests/peft/test_other_bases.py", "tests/peft/test_bases*.py"),
    "hooks that place or convert": (
        "tests/peft/test_hooks.py",
        "tests/peft/test_layerwise_casting.py",
        "tests/peft/test_qlora_no_autocast.py",
    ),
    "`run`, `LORA_KERNELS=1`, `register`, plug-ins": (
        "tests/package/test_autoload.py",
        "tests/peft/test_enabling.py",
        "tests/peft/test_tally.py",
        "tests/tools/test_run.py",
        "tests/plugins/*",
    ),
    "`usage`": ("tests/analysis/test_usage.py",),
    "groups (q/k/v, gate/up)": ("tests/*/test_group*.py",),
    "experts": ("tests/*/test_experts*.py",),
    "embeddings": ("tests/*/test_embedding*.py",),
    "convolutions": ("tests/*/test_conv*.py",),
    "`nn.MultiheadAttention`": ("tests/*/test_attention*.py",),
    "AdaLoRA, VeRA and other kinds": ("tests/peft/test_folds*.py", "tests/*/test_vera.py", "tests/*/test_shared*.py"),
    "many adapters in one batch": ("tests/*/test_multi*.py", "tests/*/test_mixed*.py"),
    "serving, vLLM's plug-in": ("tests/serving/*",),
    "several jobs on one base": ("tests/jobs/*",),
    "training methods": ("tests/train/*",),
    "analysis of adapters": ("tests/analysis/*",),
    "`torch.compile`, export, torch.func": ("tests/*/test_compile*.py", "tests/ops/test_transforms.py"),
    "Trainer, TRL, Lightning, accelerate": ("tests/frameworks/*",),
    "DDP, FSDP, tensor parallel": ("tests/distributed/*",),
    "the native kernels for CPUs": ("tests/backends/cpu/*",),
    "Triton kernels in the interpreter": ("tests/backends/composite/*", "tests/backends/triton/*"),
    "Hopper kernels in the emulator": ("tests/backends/cuda/*",),
    "the pages' code, the examples": ("tests/docs/*", "tests/examples/*"),
}
"""A feature → the files of the tests that show it. A file may show several features."""

Counts = collections.Counter[str]


class Recorder:
    """A plug-in of pytest that counts how the tests of each file end, by back-end where a test runs with several."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Counts]] = collections.defaultdict(lambda: collections.defaultdict(Counts))
        self._backends: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            chosen = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
            folder = re.match(r"tests/backends/(\w+)/", item.nodeid)
            self._backends[item.nodeid] = chosen if chosen in BACKENDS else folder[1] if folder else ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed or (report.when == "setup" and report.skipped):
            outcome = "failed" if report.failed else "skipped" if report.skipped else "passed"
            backend = self._backends.get(report.nodeid, "")
            self.files[report.nodeid.partition("::")[0]][backend][outcome] += 1


def record(arguments: Sequence[str]) -> int:
    """Run pytest with these arguments and write the JSON. Return pytest's exit status."""
    recorder = Recorder()
    chosen = list(arguments) or ["-m", "not slow"]
    status = int(pytest.main(["--rootdir", str(ROOT), *chosen], plugins=[recorder]))
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not recorder.files:
        print(f"pytest ended with status {status}: nothing is recorded")
        return status or 1
    path = write(document_of(recorder, chosen), RESULTS)
    print(f"wrote {path.relative_to(ROOT)}; now run python scripts/compatibility.py --table")
    return status


def document_of(recorder: Recorder, chosen: Sequence[str]) -> dict[str, Any]:
    """Return what is recorded: the machine, the versions, the arguments, and the counts of each file."""
    import torch

    from lora_kernels.testing import machine

    return {
        "date": datetime.date.today().isoformat(),
        "pytest": list(chosen),
        "device": machine.describe_device(torch.device("cpu")),
        "versions": machine.versions(*PACKAGES),
        "commit": machine.commit(),
        "counts": dict(total(counts for file in recorder.files.values() for counts in file.values())),
        "files": {name: {b: dict(c) for b, c in sorted(file.items())} for name, file in sorted(recorder.files.items())},
    }


def write(document: dict[str, Any], folder: Path) -> Path:
    """Write the document into `folder` under the name of its versions, and return its path."""
    from lora_kernels.core import atomic

    versions = document["versions"]
    python = ".".join(versions["python"].split(".")[:2])
    torch, peft = (str(versions[name]).partition("+")[0] for name in ("torch", "peft"))
    path = folder / f"python{python}-torch{torch}-peft{peft}.json"
    folder.mkdir(parents=True, exist_ok=True)
    atomic.replace({path: json.dumps(document, indent=1).encode() + b"\n"})
    return path


def total(counts: Iterable[Mapping[str, int]]) -> Counts:
    """Return the sums of counts by outcome."""
    found: Counts = collections.Counter()
    for each in counts:
        found.update(each)
    return found


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the documents of a folder, from the oldest torch to the newest."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(documents, key=lambda d: [_number(d["versions"][name] or "") for name in ("torch", "python", "peft")])


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


NO_RUN = "No run on record yet: `python scripts/compatibility.py --record`, then `--table`."


def environments(documents: Sequence[dict[str, Any]]) -> str:
    """Return the table of environments: the versions, and how many tests passed, failed and were skipped."""
    if not documents:
        return NO_RUN
    rows = []
    for document in documents:
        versions, counts = document["versions"], document["counts"]
        shown = [(versions.get(name) or "–").partition("+")[0] for name in SHOWN]
        results = [str(counts.get(outcome, 0)) for outcome in OUTCOMES]
        device = document["device"]
        selection = " ".join(document["pytest"])
        rows.append([versions["python"], *shown, *results, f"`{selection}`", device["name"], document["date"]])
    header = ["Python", *SHOWN, *OUTCOMES, "pytest", "CPU", "date"]
    return markdown(header, rows)


def features(documents: Sequence[dict[str, Any]]) -> str:
    """Return the table of features by environment."""
    if not documents:
        return NO_RUN
    header = ["", *(f"torch {_short(d, 'torch')}, PEFT {_short(d, 'peft')}" for d in documents)]
    rows = []
    for name, patterns in FEATURES.items():
        cells = [_cell(_matching(document, patterns)) for document in documents]
        if any(cells):
            rows.append([name, *(cell or "–" for cell in cells)])
    return markdown(header, rows)


def backends(documents: Sequence[dict[str, Any]]) -> str:
    """Return the table of features by back-end, over all environments."""
    if not documents:
        return NO_RUN
    rows = []
    for name, patterns in FEATURES.items():
        cells = [_cell(total(_matching(d, patterns, backend) for d in documents)) for backend in BACKENDS]
        if any(cells):
            rows.append([name, *(cell or "–" for cell in cells)])
    return markdown(["", *(f"`{name}`" for name in BACKENDS)], rows)


def kinds() -> str:
    """Return the table of PEFT's layers that `fuse` serves, from the package's own list."""
    from lora_kernels.peft.kinds import _FUSED

    names = [name.removeprefix("peft.tuners.").partition(".layer.") for name in _FUSED]
    found: dict[str, list[str]] = collections.defaultdict(list)
    for first, split, last in names:
        tuner, _, rest = first.partition(".")
        found[tuner].append(f"`{last if split else rest.rpartition('.')[2]}`")
    rows = [[tuner, ", ".join(layers)] for tuner, layers in found.items()]
    return markdown(["PEFT's tuner", "its layers that have a fused class"], rows)


def _short(document: dict[str, Any], package: str) -> str:
    return str(document["versions"][package]).partition("+")[0]


def _matching(document: dict[str, Any], patterns: Sequence[str], backend: str | None = None) -> Counts:
    """Return the counts of the files that match a pattern, of one back-end if it is named."""
    return total(
        counts
        for name, file in document["files"].items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        for of, counts in file.items()
        if backend is None or of == backend
    )


def _cell(counts: Counts) -> str:
    """Return "412 passed, 3 skipped", or "" if no test ran."""
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])


def rendered(page: str, documents: Sequence[dict[str, Any]]) -> str:
    """Return the page with its tables made anew."""
    texts = {
        "environments": environments(documents),
        "features": features(documents),
        "backends": backends(documents),
        "kinds": kinds(),
    }
    for marker, text in texts.items():
        fresh = between(page, marker, text)
        if fresh is None:
            raise SystemExit(f"the page needs one line {begin(marker)} and one line {end(marker)} after it")
        page = fresh
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", action="store_true", help="run the tests and write the JSON of this environment")
    what.add_argument("--table", action="store_true", help="write the tables of docs/compatibility.md")
    what.add_argument("--check", action="store_true", help="change nothing; exit status 1 if the page is stale")
    args, rest = parser.parse_known_args(argv)
    if args.record:
        return record(rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    page = PAGE.read_text(encoding="utf-8")
    fresh = rendered(page, read(RESULTS))
    if args.check:
        print("docs/compatibility.md is " + ("up to date" if fresh == page else "stale: run it with --table"))
        return int(fresh != page)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
