"""Tables of the suite `llama`: geometric means over the projections of Llama 3.1, beside their targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lora_kernels.bench.report import Document, Table, met_or_missed
from lora_kernels.bench.shapes import BACKWARD, FORWARD, GRAPH

COMPOSITE, FASTEST = "ours: composite", "the fastest of ours"
"""The two subjects that have targets: the back-end that a GPU gets without a measurement, and in each cell the fastest
of our back-ends, which `verify` finds."""
RANKS = (16, 64)
DECODE_TARGET = 1.10

_PEFT_DEFAULT = "PEFT, fp32 adapters"
_FLOOR = "F.linear"
_P = 0.05

Times = dict[tuple[str, float, str], dict[str, float]]
"""Median seconds by variant, for each cell: shape, p and pass."""


class _Mean(NamedTuple):
    """A geometric mean over shapes of one time over another."""

    title: str
    what: str | None
    """A variant; None stands for the subject of the table."""
    over: str | None
    which: str
    p: float
    sign: str
    """"≤" or "≥": how the mean has to stand to its target."""
    targets: dict[str, tuple[float, float]]
    """By subject, the targets at the two ranks."""


_MEANS = (
    _Mean("forward over F.linear", None, _FLOOR, FORWARD, 0.0, "≤", {COMPOSITE: (1.15, 1.15), FASTEST: (1.05, 1.08)}),
    _Mean(
        "forward + backward over F.linear + dx", None, _FLOOR, BACKWARD, 0.0, "≤",
        {COMPOSITE: (1.18, 1.18), FASTEST: (1.10, 1.15)},
    ),
    _Mean(
        "forward + backward over F.linear + dx, p=0.05", None, _FLOOR, BACKWARD, _P, "≤", {COMPOSITE: (1.20, 1.20)}
    ),
    _Mean(
        "PEFT (fp32 adapters, p=0.05) over ours, fwd + bwd", _PEFT_DEFAULT, None, BACKWARD, _P, "≥",
        {COMPOSITE: (1.40, 1.40)},
    ),
    _Mean("PEFT (16-bit adapters, p=0.05) over ours, fwd + bwd", "PEFT", None, BACKWARD, _P, "≥", {}),
    _Mean(
        "LoRAFusion over ours, fwd + bwd, p=0.05", "lorafusion", None, BACKWARD, _P, "≥", {COMPOSITE: (1.05, 1.05)}
    ),
    _Mean("unsloth over ours, fwd + bwd", "unsloth", None, BACKWARD, 0.0, "≥", {}),
)  # fmt: skip


def tables(document: Document) -> Iterator[Table]:
    """Yield a table for each of our back-ends, one for the fastest of them, and one for decoding, if the document is a
    run of this suite."""
    if document.get("suite") != "llama":
        return
    for subject in subjects(document):
        header = ["geometric means", *(word for R in RANKS for word in (f"r={R}", "of", "target", ""))]
        yield f"Llama 3.1 8B and 70B, {subject}", header, mean_rows(document, subject)
    if rows := decode_rows(document):
        yield "Decoding in a CUDA graph, over F.linear", ["", "variant", "ratio", "target", ""], rows


def subjects(document: Document) -> list[str]:
    """Return what the tables are about: `FASTEST`, and every back-end of ours that was measured."""
    ours = list(dict.fromkeys(e["variant"] for e in document["timings"] if e["backend"]))
    return [FASTEST, *ours] if ours else []


def mean_rows(document: Document, subject: str) -> list[list[str]]:
    """Return the rows of the table about a subject. For each rank: the mean, the number of shapes in it, its target,
    and whether it is met. The last rows count the cells in which something holds."""
    times = _times(document)
    rows = []
    for mean in _MEANS:
        targets = mean.targets.get(subject, (None, None))
        cells = [_mean_cells(document, times, mean, subject, R, aim) for R, aim in zip(RANKS, targets, strict=True)]
        rows.append([mean.title, *cells[0], *cells[1]])
    faster = [_counted(document, R, _faster_than_addmm(times, subject), subject == COMPOSITE) for R in RANKS]
    rows.append(["cells that take less time than addmm_", *faster[0], *faster[1]])
    if subject != FASTEST:
        leaner = [_counted(document, R, _leaner_than_peft(document, subject), subject == COMPOSITE) for R in RANKS]
        rows.append(["layers whose peak memory is at most PEFT's less a copy of x", *leaner[0], *leaner[1]])
    return rows


def decode_rows(document: Document) -> list[list[str]]:
    """Return a row for each decoding step and each of our back-ends in a CUDA graph; the fastest has the target."""
    steps = [e for e in document["timings"] if e["pass"] == GRAPH and e["backend"]]
    fastest = {e["shape"]: min(f["ratio"][1] for f in steps if f["shape"] == e["shape"]) for e in steps}
    rows = []
    for e in steps:
        ratio = e["ratio"][1]
        judged = ratio == fastest[e["shape"]]
        aim = [f"≤ {DECODE_TARGET:.2f}", met_or_missed(ratio, DECODE_TARGET)] if judged else ["", ""]
        rows.append([e["shape"], e["variant"], f"×{ratio:.2f}", *aim])
    return rows


def _shapes(document: Document, rank: int) -> list[str]:
    return [name for name, each in document["shapes"].items() if each["R"] == rank and name.startswith("llama-")]


def _times(document: Document) -> Times:
    """Return the median times, with those of `FASTEST` among them."""
    found: Times = {}
    for e in document["timings"]:
        cell = found.setdefault((e["shape"], e["p"], e["pass"]), {})
        cell[e["variant"]] = e["seconds"][1]
        if e["backend"]:
            cell[FASTEST] = min(e["seconds"][1], cell.get(FASTEST, math.inf))
    return found


def _mean_cells(
    document: Document, times: Times, mean: _Mean, subject: str, rank: int, target: float | None
) -> list[str]:
    names, what, over = _shapes(document, rank), mean.what or subject, mean.over or subject
    cells = [times.get((name, mean.p, mean.which), {}) for name in names]
    ratios = [cell[what] / cell[over] for cell in cells if what in cell and over in cell]
    aim, count = "" if target is None else f"{mean.sign} {target:.2f}", f"{len(ratios)}/{len(names)}"
    if not ratios:
        return ["-", count, aim, ""]
    value = round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 2)
    met = target is None or (value <= target if mean.sign == "≤" else value >= target)
    return [f"×{value:.2f}", count, aim, "" if target is None else "met" if met else "missed"]


def _counted(document: Document, rank: int, held: Callable[[str], list[bool]], targeted: bool) -> list[str]:
    """Return the cells of a row that counts: how often `held` holds, of how many, and whether that is always."""
    found = [each for name in _shapes(document, rank) for each in held(name)]
    verdict = "" if not found or not targeted else "met" if all(found) else "missed"
    return [f"{sum(found)}/{len(found)}" if found else "-", "", "all" if targeted else "", verdict]


def _faster_than_addmm(times: Times, subject: str) -> Callable[[str], list[bool]]:
    def held(name: str) -> list[bool]:
        cells = [cell for (shape, _, _), cell in times.items() if shape == name]
        return [cell[subject] < cell["addmm_"] for cell in cells if subject in cell and "addmm_" in cell]

    return held


def _leaner_than_peft(document: Document, subject: str) -> Callable[[str], list[bool]]:
    """PEFT's layer keeps x̂ = dropout(x) beside x where p > 0, which this package does not."""
    peaks = {(m["shape"], m["p"], m["variant"]): m["peak_bytes"] for m in document["memory"]}

    def held(name: str) -> list[bool]:
        size, found = document["shapes"][name], []
        for p in (0.0, _P):
            ours, theirs = peaks.get((name, p, subject)), peaks.get((name, p, "PEFT"))
            if ours is not None and theirs is not None:
                copy = size["M"] * size["K"] * 2 if p else 0  # in 16 bits
                found.append(ours <= theirs - copy)
        return found

    return held
