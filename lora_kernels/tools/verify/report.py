"""What `verify` says: before it begins, at the end, and where it cannot begin."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kernels.evidence import find
from lora_kernels.evidence.file import BROKEN, RIGHT, STUCK, WRONG, Timing, Verdict
from lora_kernels.evidence.identity import Identity
from lora_kernels.testing.terminal import Terminal

RESULTS = (RIGHT, WRONG, STUCK, BROKEN)
_OURS = ("composite", "triton", "cuda")
_MENDED = (3, 7, 1)
"""The version of Triton that orders asynchronous copies before wgmma reads them."""


@dataclass
class Findings:
    """What one run has found about a device."""

    path: Path
    """The file of evidence."""
    identity: Identity
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    """By the name of the pass."""
    rows: list[list[str]] = field(default_factory=list)
    """The rows of the table of plans."""


def heading(of: Identity) -> str:
    """Return a line that names the device and what evidence about it depends on."""
    parts = [
        f"{of.device} ({of.arch}, {of.multiprocessors} multiprocessors)",
        f"driver {of.driver}",
        f"torch {of.torch}",
        f"Triton {of.triton or 'not installed'}",
        *([f"ptxas {of.ptxas}"] if of.ptxas else []),
        f"CUDA kernels {'built' if of.extension else 'not built'}",
    ]
    return ", ".join(parts)


def advice(of: Identity, refusals: Mapping[str, list[str]]) -> list[str]:
    """Return lines about what is missing, or known to be wrong, on this machine."""
    lines = [f"{name} does not run here: {'; '.join(reasons)}" for name, reasons in refusals.items()]
    arch = re.fullmatch(r"sm_(\d+)", of.arch)
    version = tuple(map(int, re.findall(r"\d+", of.triton or "")[:3]))
    if arch and int(arch[1]) >= 90 and version and version < _MENDED:
        lines.append(
            f"Triton {of.triton} leaves out a fence on {of.arch} that its release 3.7.1 has. Kernels that go wrong "
            "without it are found here and not used; pip install 'triton>=3.7.1' mends them"
        )
    return lines


def gaps(gpu: Mapping[str, Any]) -> list[str]:
    """Return what the evidence lacks about a GPU, as sentences; empty where it is complete."""
    faults = [f"{path} does not hold here: {'; '.join(why)}" for path, why in gpu["passed"]]
    missing = [each["key"] for each in gpu["classes"] if each["key"] not in gpu["verdicts"]]
    total, passes = len(gpu["classes"]), gpu["unmeasured"]
    if not gpu["used"]:
        faults.append(f"there is no evidence here (python -m lora_kernels verify makes it, in {_place(gpu)})")
    elif missing:
        faults.append(f"{len(missing)} of {total} classes of kernels were not judged: {', '.join(missing)}")
    if gpu["used"] and passes:
        faults.append(f"not measured, and nothing near it: {', '.join(passes)}")
    # A file that does not hold is no fault where others do.
    return faults if missing or passes or not gpu["used"] else []


def _place(gpu: Mapping[str, Any]) -> Path:
    return find.cache_path(Identity(**gpu["identity"]))


def unwritable(path: Path, error: OSError) -> str:
    """Return a sentence about a file that cannot be written, with the ways out."""
    return (
        f"{path} cannot be written ({error.strerror or error}). Set XDG_CACHE_HOME to a folder that can be, or write "
        f"elsewhere by --out FILE and set {find.VARIABLE}=FILE for the processes that train"
    )


def show(terminal: Terminal, found: Findings, chosen: Mapping[str, str]) -> None:
    """Show what was switched on, what was not, and where it was written. `chosen` has the back-end of each pass."""
    if found.rows:
        terminal.table("Plans, old against new", ("shape", "pass", "old µs", "new µs", "new / old", "plan"), found.rows)
    if found.timings:
        header = ("shape", "pass", "frozen µs", "chosen", *_OURS, "eager", "addmm_", "PEFT")
        rows = [_row(name, timing, chosen.get(name, "?")) for name, timing in found.timings.items()]
        terminal.table("What was switched on, and times over the frozen layer's", header, rows)
    counts = Counter(verdict.result for verdict in found.verdicts.values())
    told = ", ".join(f"{counts[result]} {result}" for result in RESULTS if counts[result]) or "none"
    terminal.line(f"\nClasses of kernels: {told}")
    for key, verdict in sorted(found.verdicts.items()):
        if verdict.result != RIGHT:
            terminal.line(f"  not used: {key}: {verdict.result}: {verdict.why}")
    terminal.line(f"Written: {found.path}")
    if found.path != find.cache_path(found.identity).resolve():
        terminal.line(f"{find.VARIABLE}={found.path} lets other processes read it.")
    elif os.environ.get(find.VARIABLE):
        terminal.line(f"{find.VARIABLE}={os.environ[find.VARIABLE]} is set, and counts before this file.")
    terminal.line("Processes that already run keep what they have read.")


def _row(name: str, timing: Timing, chosen: str) -> list[str]:
    size, p, op = name.split(" ")
    ratios = [
        f"{timing.ratios[each][1]:.2f}" if each in timing.ratios else "" for each in (*_OURS, "eager", "addmm_", "PEFT")
    ]
    label = op if p == "p=0" else f"{op} {p}"
    return [size, label, f"{1e6 * timing.frozen_seconds:.1f}", chosen, *ratios]
