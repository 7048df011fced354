"""Check and measure the kernels on a machine with an NVIDIA GPU that you have for minutes only. No network is needed.

    scripts/gpu_check.sh OUT_DIR [SECTION ...] [--total SECONDS] [--prebuilt FOLDER] [--peer NAME=PATH]

The sections run in the order in which they are named. Without names these run: device, verify, numbers, tests. Before
them the native code is built, unless --prebuilt names a folder that gpu_prepare.sh has filled.

The check ends within --total seconds, whatever hangs. Each section gets its share of the time, and what one leaves goes
to those after it. A section that fails, or runs out of time, does not stop the next one. Every command is a process
with a time limit (gpu_run.py). `verify` distinguishes a kernel that hangs from one that is only slow to compile. If a
kernel hangs in the bench, its process ends, and another process continues without that kernel.

OUT_DIR gets at most 8 files, none above 16 MB. evidence.json is written after each verdict and each time, the JSON of
the bench after each layer, log.txt after each command, check.json after each section, and running.txt while commands
run. A table is printed at the end. The exit status is 1 if a section failed. gpu_report.py makes README's table.
``--device cpu`` is a dry run on a machine without a GPU. This script has not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_prebuilt
from gpu_run import ENDING, Check, run_step
from gpu_sections import BUILD, SECTIONS, USUAL, Section

MAX_FILES, MAX_BYTES = 8, 16 * 2**20
"""The limits on OUT_DIR. The log stays below MAX_BYTES, because `gpu_run` shortens every output."""
KEPT = ("check.json", "log.txt", "evidence.json", "llama.json", "sweep.json", "numbers.json")
"""The files that are kept first."""


def keep_within_limits(out: Path) -> None:
    """Leave at most MAX_FILES files of at most MAX_BYTES in `out`. Files that are too large go first (text is cut
    instead), then the least important ones. Hidden files, which are locks of processes that have ended, go too."""
    for path in out.glob(".*"):
        path.unlink()
    files = [path for path in out.iterdir() if path.is_file()]
    small = [path for path in files if path.stat().st_size <= MAX_BYTES]
    small.sort(key=lambda path: (KEPT.index(path.name) if path.name in KEPT else len(KEPT), path.name))
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


def run_section(section: Section, check: Check, share: float, log: Path) -> dict[str, object]:
    """Run a section and return its row of the table: name, seconds, and "ok", "nothing to do" or what failed.

    `share` is the part of the time that is left that it may take.
    """
    start = time.monotonic()
    seconds = share * check.left()
    results: list[str] = []
    try:
        steps = section.commands(check, seconds)
        for step in steps:
            left = seconds - (time.monotonic() - start)
            if left <= 0:
                results.append(f"no time left for {step[0].name}")
                break
            results.append(run_step(step, left, check, log, section.name))
            if section.first and results[-1] == "ok":
                if step is steps[-1] and len(steps) > 1:
                    results[-1] = f"at last {step[0].name}"
                else:
                    results = ["ok"]
                break
    except Exception as error:  # no failure of a section may stop the next one
        results.append(f"{type(error).__name__}: {error}")
    wrong = [result for result in results if result != "ok"]
    result = "; ".join(dict.fromkeys(wrong)) if wrong else "ok" if results else "nothing to do"
    return _row(section, result, bool(wrong), round(time.monotonic() - start, 1))


def _row(section: Section, result: str, failed: bool, seconds: float = 0.0) -> dict[str, object]:
    return {"section": section.name, "seconds": seconds, "result": result, "failed": failed}


def table(rows: Sequence[dict[str, object]]) -> str:
    lines = [f"{'section':<12}{'seconds':>8}  result"]
    lines += [f"{row['section']:<12}{row['seconds']:>8}  {row['result']}" for row in rows]
    return "\n".join(lines)


def parser(sections: Sequence[Section]) -> argparse.ArgumentParser:
    names = [section.name for section in sections]
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "out", type=Path, metavar="OUT_DIR", help="an empty folder for the results; it is made if needed"
    )
    result.add_argument("sections", nargs="*", metavar="SECTION", help=f"one of {', '.join(names)}")
    result.add_argument(
        "--total", type=float, metavar="SECONDS", help="the most that the check may take (default: the sections' usual)"
    )
    result.add_argument("--prebuilt", type=Path, metavar="FOLDER", help="build nothing; use what gpu_prepare.sh made")
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run")
    result.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another project to measure, as for lora_kernels bench",
    )
    return result


def main(
    argv: Sequence[str] | None = None,
    sections: Sequence[Section] = SECTIONS,
    usual: Sequence[str] = USUAL,
    build: Section = BUILD,
) -> int:
    options = parser(sections)
    args = options.parse_intermixed_args(argv)
    named = {section.name: section for section in sections}
    if unknown := [name for name in args.sections if name not in named]:
        options.error(f"{', '.join(unknown)}: the sections are {', '.join(named)}")
    chosen = [named[name] for name in args.sections or usual]
    if args.prebuilt is None:
        chosen.insert(0, build)
    total = args.total or sum(section.share for section in chosen) + ENDING
    if total <= ENDING:
        options.error(f"--total {total:g}: {ENDING:g} seconds are kept for ending what still runs; give more")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        options.error(f"{args.out} is not empty, and at most {MAX_FILES} files are kept in it: name a new folder")
    check = Check(out, total, args.device, args.peer)
    if args.prebuilt is not None:
        try:
            check.environment = gpu_prebuilt.put_in_place(args.prebuilt.resolve())
        except gpu_prebuilt.Unusable as error:
            options.error(f"--prebuilt {args.prebuilt}: {error}")
    rows = run(check, chosen)
    print(table(rows), flush=True)
    return int(any(row["failed"] for row in rows))


def run(check: Check, sections: Sequence[Section]) -> list[dict[str, object]]:
    """Run sections one after the other and return their rows of the table."""
    log = check.out / "log.txt"
    log.touch()
    rows: list[dict[str, object]] = []
    for i, section in enumerate(sections):
        if check.hopeless or check.left() <= 0:
            rows.append(_row(section, f"not run: {check.hopeless or 'the time is over'}", True))
        else:
            share = section.share / sum(each.share for each in sections[i:])
            rows.append(run_section(section, check, share, log))
        print(f"===== {section.name}: {rows[-1]['result']}, {rows[-1]['seconds']} s\n", flush=True)
        (check.out / "check.json").write_text(json.dumps({"rows": rows, "verdicts": check.verdicts()}, indent=1) + "\n")
        keep_within_limits(check.out)  # after each section: the end may never come
    return rows


if __name__ == "__main__":
    sys.exit(main())
