"""Write the measured tables, sentences and the charts of README.md and of four pages of docs from benchmarks/results.

    python scripts/update_readme.py [--check] [RESULT.json ...]

Each of them stands between two markers, such as <!-- bench:begin --> and <!-- bench:end -->. Without names the newest
run of each device type (CPU, CUDA) is taken. So are the newest runs of quantised layers, of generation, of many
adapters, of layers of other kinds, of the sweep over ranks, of pretraining and of the suites on each GPU, which have
folders of their own; gpu_report.py fills that of the GPUs. Relative links of README become absolute, for PyPI.
``--check`` changes nothing: its exit status is 1 if a file is stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_tables
import kinds_tables
import links
import many_tables
import ranks_tables
import relora_tables
from readme_tables import BACKWARD, NO_RUN, Run, Runs, bench, chosen, generation, quantised, ratio

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a file is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of README.md and benchmarks/results")
    args = parser.parse_args(argv)
    results = args.root / "benchmarks" / "results"
    runs = {"bench": args.results or newest(results)}
    runs |= {name: newest(results / name) for name in FOLDERS}
    runs["gpu"] = newest(results / "gpu", lambda document: f"{document['device']['name']} {document['suite']}")
    stale = False
    for name, blocks in PAGES.items():
        page = args.root / name
        old = fresh = page.read_text(encoding="utf-8")
        for marker, render in blocks.items():
            text = render({kind: [Run.read(path, page, args.root) for path in paths] for kind, paths in runs.items()})
            found = between(fresh, marker, text)
            if found is None:
                print(f"{name} needs one line {begin(marker)} and one line {end(marker)} after it")
                return 1
            fresh = found
        if name == "README.md":
            fresh = links.absolute(fresh)
        if args.check and fresh != old:
            print(f"{name} is stale: run python scripts/update_readme.py")
        elif not args.check:
            page.write_text(fresh, encoding="utf-8")
            print(f"{name} is up to date" if fresh == old else f"{name}: tables written")
        stale |= fresh != old
    return int(args.check and stale)


def begin(marker: str) -> str:
    return f"<!-- {marker}:begin -->"


def end(marker: str) -> str:
    return f"<!-- {marker}:end -->"


def between(text: str, marker: str, fresh: str) -> str | None:
    """Return `text` with `fresh` between the two markers, or None if they are not there once each, in this order."""
    first, last = begin(marker), end(marker)
    if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
        return None
    head, rest = text.split(first)
    return f"{head}{first}\n{fresh}\n{last}{rest.split(last)[1]}"


def newest(folder: Path, kind_of: Callable[[Any], str] = lambda document: document["device"]["type"]) -> list[Path]:
    """Return the newest run of each kind, which is that of its device by default, by the date in its document."""
    best: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        kind = kind_of(document)
        best[kind] = max(best.get(kind, ("", path)), (document["date"], path))
    return [best[kind][1] for kind in sorted(best)]


def span(runs: Runs) -> str:
    """Return a sentence for each run: the lowest and the highest ratio to the frozen layer, ours and PEFT's."""
    lines = []
    for run in runs["bench"]:
        cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for entry in run.document["timings"]:
            if entry["pass"] == BACKWARD:
                cells.setdefault((entry["shape"], entry["p"]), []).append(entry)
        ours = [entry["ratio"][1] for cell in cells.values() if (entry := chosen(cell))]
        theirs = [entry["ratio"][1] for cell in cells.values() for entry in cell if entry["variant"] == "PEFT"]
        if ours and theirs:
            lines.append(
                f"Forward + backward takes {min(ours):.2f} to {max(ours):.2f} times the frozen layer's time, and with "
                f"PEFT's layers {min(theirs):.2f} to {max(theirs):.2f} times: {len(ours)} cases of layer, dtype and "
                f"dropout, on {run.machine()}, {run.document['date'][:10]}."
            )
    return "\n".join(lines) or NO_RUN


def small(runs: Runs) -> str:
    """Return a sentence for each run: a fused PEFT layer so small that Python takes most of the time, in fp32."""
    lines = []
    for run in runs["bench"]:
        calls = [call for call in run.document.get("layer_calls", []) if call["over_peft"]]
        calls = [call for call in calls if (call["layer"], call["dtype"]) == ("PEFT's, fused", "fp32")]
        if calls:
            told = ", ".join(f"{call['over_peft'][1]:.2f} ({call['which']}, M = {call['M']})" for call in calls)
            lines.append(
                "`fuse` gains least for small layers, where Python takes most of the time. A fused 128×128 layer in "
                f"fp32 takes this many times the time of PEFT's own: {told}; {run.machine()}, "
                f"{run.document['date'][:10]}."
            )
    return "\n".join(lines) or NO_RUN


def numbers(runs: Runs) -> str:
    """Return a table of numbers beside PEFT's, each with its machine: the time of a training step, the bytes that it
    saves, the time of a decoding step, and decoding with many adapters in a batch."""
    rows = []
    for run in runs["bench"]:
        rows += [_step_number(run), _bytes_number(run)]
    rows += [_decode_number(run) for run in runs["quantised"]]
    for kind, number in (
        ("kinds", kinds_tables.number),
        ("many", many_tables.number),
        ("generation_many", many_tables.generation_number),
    ):
        rows += [_number_row(run, *found) for run in runs[kind] if (found := number(run))]
    lines = [row for row in rows if row]
    if not lines:
        return NO_RUN
    return "\n".join(["| | lora_kernels | PEFT | measured on |", "|---|---|---|---|", *lines])


SHAPE, P = "gpt2-mlp-up", 0.1
"""The layer and the dropout of the first two numbers of `numbers`."""


def _step_number(run: Run) -> str:
    cells = [e for e in run.document["timings"] if (e["shape"], e["p"], e["pass"]) == (SHAPE, P, BACKWARD)]
    ours, theirs = chosen(cells), next((e for e in cells if e["variant"] == "PEFT"), None)
    if ours is None or theirs is None:
        return ""
    what = f"Forward + backward over the frozen layer's: {run.document['shapes'][SHAPE]['size']}, dropout {P:g}"
    return _number_row(run, what, ratio(ours), ratio(theirs))


def _bytes_number(run: Run) -> str:
    cells = [m for m in run.document["memory"] if (m["shape"], m["p"]) == (SHAPE, P)]
    automatic = chosen([e for e in run.document["timings"] if (e["shape"], e["p"]) == (SHAPE, P)])
    ours = next((m for m in cells if automatic and m["variant"] == automatic["variant"]), None)
    theirs = next((m for m in cells if m["variant"] == "PEFT"), None)
    if ours is None or theirs is None:
        return ""
    sizes = [f"{m['saved_bytes'] / 2**20:.1f} MiB" for m in (ours, theirs)]
    return _number_row(run, "Saved for the backward of that layer", *sizes)


def _decode_number(run: Run) -> str:
    rows = {row["name"]: row for row in run.document["rows"] if row["M"] == 1}
    pairs = [(rows.get(f"nf4 {dtype}"), rows.get(f"PEFT + bitsandbytes {dtype}")) for dtype in ("bf16", "fp32")]
    if not all(ours and theirs for ours, theirs in pairs):
        return ""
    size = run.document["size"]
    what = f"One decoding step over nf4 (PEFT over bitsandbytes): {size['K']}→{size['N']} r{size['R']}, bf16 / fp32"
    times = [" / ".join(f"{pair[i]['seconds'][1] * 1e3:.2f}" for pair in pairs if pair[i]) + " ms" for i in (0, 1)]
    return _number_row(run, what, *times)


def _number_row(run: Run, what: str, ours: str, theirs: str) -> str:
    machine = f"[{run.machine()}, {run.document['date'][:10]}]({run.link()})"
    return f"| {what} | **{ours}** | {theirs} | {machine} |"


def chart(runs: Runs) -> str:
    """Return the image of the newest bench that has one: forward + backward over the frozen layer."""
    drawn = [run for run in runs["bench"] if run.path.with_suffix(".png").exists()]
    if not drawn:
        return NO_RUN
    run = max(drawn, key=lambda run: str(run.document["date"]))
    text = f"Forward + backward over the frozen layer's, on {run.machine()}"
    return f"![{text}]({run.link(run.path.with_suffix('.png'))})"


FOLDERS = ("quantised", "generation", "many", "generation_many", "vllm", "kinds", "ranks", "relora")
"""The folders of benchmarks/results with runs of their own, apart from those of the GPUs."""
Render = Callable[[Runs], str]
PAGES: dict[str, dict[str, Render]] = {
    "README.md": {
        "range": span,
        "numbers": numbers,
        "chart": chart,
        "gpu": gpu_tables.short,
        "ranks": ranks_tables.short,
    },
    "docs/measuring.md": {
        "gpu": gpu_tables.full,
        "bench": bench,
        "small": small,
        "quantised": quantised,
        "generation": generation,
        "many": many_tables.layers,
        "generation-many": many_tables.generation,
        "kinds": kinds_tables.layers,
    },
    "docs/vllm.md": {"vllm": many_tables.operators},
    "docs/ranks.md": {"ranks": ranks_tables.full},
    "docs/relora.md": {"relora": relora_tables.measured},
}
"""The markers of each page, and the function that returns the text between them."""

if __name__ == "__main__":
    sys.exit(main())
