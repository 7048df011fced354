"""The document of the suite `many` as a person reads it: tables of plain strings, and lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_kernels.bench import report
from lora_kernels.bench.many.cells import (
    BASE_ONLY,
    DECODE,
    FLOOR,
    FROZEN,
    LOOP,
    ONE,
    OURS,
    OWN,
    PEFT,
    SWITCHED,
    TRAINING,
)
from lora_kernels.bench.report import Document, Table

RIVALS = (PEFT, SWITCHED, LOOP, FLOOR, OWN, ONE)
"""The columns of a table, between F.linear's and ours."""

_TITLES = {
    DECODE: "Decoding: a forward, rows of all adapters in random order",
    BASE_ONLY: "No row has an adapter, beside a stack of eight",
    TRAINING: "Training: forward + backward, adapters × rows of each",
}


def tables(document: Document) -> Iterator[Table]:
    """Yield a table for each kind of cell and dtype: times over F.linear's, and what ours has to reach."""
    timings = {(e["cell"], e["method"]): e for e in document["timings"]}
    for kind, dtype in groups(document):
        names = [name for name, cell in document["cells"].items() if (cell["kind"], cell["dtype"]) == (kind, dtype)]
        rivals = [rival for rival in RIVALS if any((name, rival) in timings for name in names)]
        aimed = [target for name in names for target in timings.get((name, OURS), {}).get("targets", [])]
        held = {t["to"]: f"of {t['to']} ≤ {t['most']:.2f}" for t in aimed if t["to"] in (PEFT, FLOOR, ONE)}
        rows = []
        for name in names:
            found = {method: timings.get((name, method)) for method in (FROZEN, *rivals, OURS)}
            red = {check["method"] for check in document["gate"] if check["cell"] == name and not check["green"]}
            cells = [_cell(method, entry, method in red) for method, entry in found.items()]
            aims = [target_words(_target(found[OURS], to)) for to in ((FROZEN, OWN), *((to,) for to in held))]
            rows.append([size(document["cells"][name]), *cells, *aims])
        width = document["cells"][names[0]]["width"]
        title = f"{_TITLES[kind]} · {dtype}, {width}→{width}; time over F.linear's"
        yield title, [label(kind), FROZEN, *rivals, "ours", "target", *held.values()], rows
    if document["calls"]:
        rows = [[call["what"], f"{call['value']:.4g} {call['unit']}", *_at_most(call)] for call in document["calls"]]
        yield "Beside the layers", ["", "", "target", ""], rows


def groups(document: Document) -> list[tuple[str, str]]:
    """Return the kinds of cells and their dtypes, in the order in which they were measured."""
    return list(dict.fromkeys((cell["kind"], cell["dtype"]) for cell in document["cells"].values()))


def label(kind: str) -> str:
    """Return the title of the column that names a cell."""
    return "adapters × rows" if kind == TRAINING else "rows, adapters"


def size(cell: dict[str, Any]) -> str:
    """Return the name of a cell within its table."""
    if cell["kind"] != TRAINING:
        return f"{cell['M']}, {cell['n']}"
    return f"{cell['n']}×{cell['M'] // cell['n']} p={cell['p']:g}"


def _cell(method: str, entry: dict[str, Any] | None, red: bool) -> str:
    if entry is None:
        return "red" if red else "-"
    return report.duration(entry["seconds"][1]) if method == FROZEN else f"×{entry['ratio'][1]:.2f}"


def _target(ours: dict[str, Any] | None, to: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the target of ours beside one of the methods `to`, if it has one."""
    return next((target for target in (ours or {}).get("targets", []) if target["to"] in to), None)


def target_words(target: dict[str, Any] | None) -> str:
    """Return what ours has to reach beside another method and whether it did; empty without a target. The limits beside
    PEFT, addmm_ and single are the same in all cells, and the title of their column names them."""
    if target is None:
        return ""
    value, most, verdict = f"{target['value'][1]:.2f}", f"{target['most']:.2f}", "met" if target["met"] else "missed"
    if target["over"]:
        return f"{target['value'][1]:+.2f} ≤ {most} {verdict}"
    return f"≤ {most} {verdict}" if target["to"] == FROZEN else f"{value} {verdict}"


def _at_most(call: dict[str, Any]) -> list[str]:
    if call["most"] is None:
        return ["", ""]
    return [f"≤ {call['most']:g} {call['unit']}", "met" if call["value"] <= call["most"] else "missed"]


def closing(document: Document) -> Iterator[str]:
    """Yield the lines after the tables: faults, targets met and missed, back-ends, noise, notes."""
    for check in document["gate"]:
        if not check["green"]:
            yield f"✗ {check['cell']}: {check['method']}: judged wrong, no number: {'; '.join(check['faults'][:3])}"
    for to, met, count in counted(document):
        yield f"Targets beside {to}: {met} of {count} met"
    served: dict[str, list[str]] = {}
    for name, cell in document["cells"].items():
        served.setdefault(cell["backend"], []).append(name)
    for backend, names in served.items():
        yield f"{OURS} is served by {backend} in {len(names)} of {len(document['cells'])} cells"
    yield from report.noise(document)
    yield from document["notes"]


def counted(document: Document) -> list[tuple[str, int, int]]:
    """Return, for each method that ours is held against, how many targets are met, and of how many."""
    held = [target for e in document["timings"] if e["method"] == OURS for target in e["targets"]]
    names = dict.fromkeys(target["to"] for target in held)
    return [(to, sum(t["met"] for t in held if t["to"] == to), sum(t["to"] == to for t in held)) for to in names]
