"""The tables of runs on a GPU, for README.md and docs/measuring.md: the suite `llama` beside its targets."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from readme_tables import Run, Runs, markdown

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_kernels.bench import report_suite

NO_GPU_RUN = "The kernels for GPUs have **not yet run on a GPU**, so there are no numbers of one."


def short(runs: Runs) -> str:
    """Return a heading and one small table for each GPU: the means over the frozen layer."""
    return "\n\n".join(f"{_heading(run)}\n\n{_small(run)}" for run in suites(runs)) or NO_GPU_RUN


def full(runs: Runs) -> str:
    """Return all tables of each GPU, and the pictures."""
    parts = []
    for run in suites(runs):
        parts.append(_heading(run))
        for title, header, rows in report_suite.tables(run.document):
            parts += [f"{title}:", markdown(header, rows)]
    for run in runs["gpu"]:
        picture = run.path.with_name(f"{run.path.stem}-roofline.png")
        if picture.exists():
            parts.append(f"![Time over the roofline's floor, on {run.machine()}]({run.link(picture)})")
    return "\n\n".join(parts) or NO_GPU_RUN


def suites(runs: Runs) -> list[Run]:
    """Return the runs of the suite `llama`."""
    return [run for run in runs["gpu"] if run.document["suite"] == "llama"]


def _heading(run: Run) -> str:
    document = run.document
    device, versions = document["device"], document["versions"]
    return (
        f"**{device['name']}** ({device['arch']}, driver {device['driver']}), torch {versions['torch']}, Triton "
        f"{versions['triton']}, {document['date'][:10]}: bf16, the projections of Llama 3.1 8B and 70B at M 2048, "
        f"8192 and 16384, geometric means of medians of {document['rounds']} interleaved rounds ([all "
        f"numbers]({run.link()}))."
    )


def _small(run: Run) -> str:
    rows = []
    for subject in (report_suite.COMPOSITE, report_suite.FASTEST):
        if subject in report_suite.subjects(run.document):
            for title, *cells in report_suite.mean_rows(run.document, subject)[:3]:
                rows.append([f"{subject.removeprefix('ours: ')}: {title}", _one(cells[:4]), _one(cells[4:])])
    return markdown(["", *(f"r={R}" for R in report_suite.RANKS)], rows)


def _one(cells: Sequence[str]) -> str:
    mean, count, target, verdict = cells
    return f"{mean} of {count} layers{f', {target} {verdict}' if target else ''}"
