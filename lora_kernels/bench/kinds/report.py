"""The document of the suite `kinds` as a person reads it: tables of plain strings, and lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_kernels.bench import report
from lora_kernels.bench.kinds.cells import FROZEN, OURS, PEFT, SAVED
from lora_kernels.bench.report import Document, Table


def tables(document: Document) -> Iterator[Table]:
    """Yield a table for each kind: times over the frozen layer's, bytes saved, and what ours has to reach."""
    timings = {(e["cell"], e["way"]): e for e in document["timings"]}
    for kind in kinds(document):
        names = [name for name, cell in document["cells"].items() if cell["kind"] == kind]
        others = dict.fromkeys(e["way"] for e in document["timings"] if e["cell"] in names)
        ways = [way for way in others if way not in (FROZEN, OURS)]
        rows = []
        for name in names:
            cell = document["cells"][name]
            red = {check["way"] for check in document["gate"] if check["cell"] == name and not check["green"]}
            times = [_time(way, timings.get((name, way)), way in red) for way in (FROZEN, *ways, OURS)]
            saved = [_saved(timings.get((name, way))) for way in (PEFT, OURS)]
            met = "; ".join(target_words(t) for t in timings.get((name, OURS), {}).get("targets", []))
            rows.append([size(cell), *times, *saved, met])
        title = f"{kind}: time over the frozen layer's"
        yield title, [kind, FROZEN, *ways, OURS, f"{PEFT} saves", f"{OURS} saves", "targets"], rows


def kinds(document: Document) -> list[str]:
    """Return the kinds of layers, in the order in which they were measured."""
    return list(dict.fromkeys(cell["kind"] for cell in document["cells"].values()))


def size(cell: dict[str, Any]) -> str:
    """Return the name of a cell within its table."""
    short = "" if cell["dtype"] == "float32" else f", {cell['dtype']}"
    return f"{cell['name']}{short}{'' if cell['backward'] else ', forward'}"


def target_words(target: dict[str, Any]) -> str:
    """Return what ours has to reach, what it reached, and whether that is enough."""
    what = f"{target['to']}'s bytes" if target["what"] == SAVED else target["to"]
    verdict = "met" if target["met"] else "missed"
    return f"{target['value']:.2f} ≤ {target['most']:.2f} of {what}: {verdict}"


def _time(way: str, entry: dict[str, Any] | None, red: bool) -> str:
    if entry is None:
        return "red" if red else "-"
    return report.duration(entry["seconds"][1]) if way == FROZEN else f"×{entry['ratio'][1]:.2f}"


def _saved(entry: dict[str, Any] | None) -> str:
    return "-" if entry is None or entry["saved"] is None else f"{entry['saved'] / 2**20:.2f} MiB"


def closing(document: Document) -> Iterator[str]:
    """Yield the lines after the tables: faults, targets met and missed, noise, notes."""
    for check in document["gate"]:
        if not check["green"]:
            yield f"✗ {check['cell']}: {check['way']}: judged wrong, no number: {'; '.join(check['faults'][:3])}"
    met, count = counted(document)
    yield f"Targets: {met} of {count} met"
    yield from report.noise(document)
    yield from document["notes"]


def counted(document: Document) -> tuple[int, int]:
    """Return how many targets are met, and of how many."""
    held = [target["met"] for e in document["timings"] for target in e.get("targets", [])]
    return sum(held), len(held)
