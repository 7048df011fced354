"""The document of a run as a person reads it: tables of plain strings, and lines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lora_kernels.bench.overhead import CALL_TARGET_US, IMPORT_TARGET_MS, LAYER_SIZE, LAYER_TARGET
from lora_kernels.bench.shapes import BACKWARD, FORWARD, GRAPH

Document = dict[str, Any]
Table = tuple[str, list[str], list[list[str]]]

NOISY = 0.15
"""A run is called noisy if in any cell the floor differs from itself by more than this in a quarter of the rounds."""

_COLUMNS = ((FORWARD, "forward"), (GRAPH, "in a graph"), (BACKWARD, "fwd + bwd"))


def where(document: Document) -> str:
    """Return the machine, the versions and the number of rounds, in a line."""
    device, versions = document["device"], document["versions"]
    if device["type"] == "cuda":
        name = f"{device['name']} ({device['arch']}, driver {device['driver']})"
    else:
        name = f"{device['name']}, {device['threads']} threads, {device['isa']}"
    packages = ", ".join(f"{name} {version or '-'}" for name, version in versions.items())
    return f"{name} · {packages} · {document['rounds']} rounds"


def rates(document: Document) -> str:
    """Return the rates from which floors are computed, in a line."""
    measured = document["roofline"]
    gemm = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in measured["gemm"].items())
    return f"Roofline, measured now: GEMM {gemm}; copy {measured['copy'] / 1e9:.4g} GB/s. % is floor / time."


def shape_table(document: Document, shape: str) -> Table:
    """Return the table of a shape: a row for each variant, a column for each pass and p.

    A cell holds the time, its ratio to the frozen layer, half the ratio's interquartile range, and the fraction of the
    roofline reached. The last row holds the roofline's floor. "red" stands for results that are judged wrong.
    """
    entries = {(e["variant"], e["pass"], e["p"]): e for e in document["timings"] if e["shape"] == shape}
    checks = [check for check in document["gate"] if check["shape"] == shape]
    red = {(f"ours: {check['backend']}", check["p"]) for check in checks if not check["green"]}
    columns = [
        (which, p, f"{label} p={p:g}")
        for which, label in _COLUMNS
        for p in dict.fromkeys(e["p"] for e in document["timings"] if e["shape"] == shape)
        if any(e["pass"] == which and e["p"] == p for e in entries.values())
    ]
    automatic = {e["variant"] for e in entries.values() if e["automatic"]}
    rows = []
    for name in dict.fromkeys([*(variant for variant, *_ in entries), *sorted(variant for variant, _ in red)]):
        row = [f"{name} (automatic)" if name in automatic else name]
        for which, p, _ in columns:
            entry = entries.get((name, which, p))
            row.append("red" if (name, p) in red else "-" if entry is None else _cell(entry))
        rows.append(row)
    floors = [_roof([e for e in entries.values() if (e["pass"], e["p"]) == (which, p)]) for which, p, _ in columns]
    if any(floors):
        rows.append(["roofline", *(text or "-" for text in floors)])
    return f"{shape} · {document['shapes'][shape]['size']}", ["", *(title for *_, title in columns)], rows


def _cell(entry: dict[str, Any]) -> str:
    low, ratio, high = entry["ratio"]
    reached = f" {100 * entry['floor']['seconds'] / entry['seconds'][1]:3.0f}%" if entry.get("floor") else ""
    if entry["variant"] == "F.linear":
        return f"{duration(entry['seconds'][1])}             {reached}"
    return f"{duration(entry['seconds'][1])} ×{ratio:.2f} ±{(high - low) / 2:.2f}{reached}"


def _roof(entries: list[dict[str, Any]]) -> str:
    """Return the floor of a column, for the layer with its adapter; empty if there is none."""
    floors = [e["floor"] for e in entries if e.get("floor") and e["variant"] != "F.linear"]
    return f"{duration(floors[0]['seconds'])} ({floors[0]['bound']})" if floors else ""


def faults(document: Document, shape: str) -> Iterator[str]:
    """Yield a line for each row of a shape's table that has no numbers because the judge found faults."""
    for check in document["gate"]:
        if check["shape"] == shape and not check["green"]:
            yield f"✗ {check['backend']} p={check['p']:g}: judged wrong, no numbers: {'; '.join(check['faults'])}"


def summary(document: Document) -> Iterator[Table]:
    """Yield the tables of targets, bytes and call overhead, without those that have no rows."""
    if any(e["target"] is not None for e in document["timings"]):
        yield _targets_table(document)
    if document["memory"]:
        yield _memory_table(document)
    if document["overhead"]:
        yield _overhead_table(document)
    if document["layer_calls"]:
        yield _layer_calls_table(document)


def met_or_missed(ratio: float, target: float) -> str:
    """Return "met" if a ratio, rounded to the two decimals that are shown, is at most the target, else "missed"."""
    return "met" if round(ratio, 2) <= target else "missed"


def _targets_table(document: Document) -> Table:
    peft = {(e["shape"], e["p"]): e for e in document["timings"] if e["variant"] == "PEFT" and e["pass"] == BACKWARD}
    rows = []
    for e in (e for e in document["timings"] if e["target"] is not None):
        theirs = peft.get((e["shape"], e["p"]))
        rows.append(
            [
                e["shape"],
                f"{e['p']:g}",
                e["variant"],
                f"×{e['ratio'][1]:.2f}",
                f"≤ {e['target']:.2f}",
                met_or_missed(e["ratio"][1], e["target"]),
                f"×{theirs['ratio'][1]:.2f}" if theirs else "-",
                f"{e['over_peft'][1]:.2f}" if e["over_peft"] else "-",
            ]
        )
    header = ["forward + backward", "p", "variant", "ratio", "target", "", "PEFT", "ours / PEFT"]
    return "Targets: ratio to the frozen layer", header, rows


def _overhead_table(document: Document) -> Table:
    rows = [
        [
            o["backend"],
            f"{o['p']:g}",
            "recorded" if o["grad"] else "no",
            f"{o['call_us']:.1f}",
            f"{o['backend_us']:.1f}",
            f"{o['overhead_us']:.1f}",
            f"≤ {CALL_TARGET_US:g}",
            "met" if o["overhead_us"] <= CALL_TARGET_US else "missed",
        ]
        for o in document["overhead"]
    ]
    header = ["back-end", "p", "gradients", "lora_linear, µs", "its forward, µs", "overhead, µs", "target", ""]
    return "A call beside its kernels: 4×64→64 r8, forward", header, rows


def _layer_calls_table(document: Document) -> Table:
    rows = []
    for call in document["layer_calls"]:
        cells = [call["layer"], call["which"], str(call["M"]), call["dtype"]]
        if call["faults"]:
            rows.append([*cells, "red", "", "", "", "; ".join(call["faults"])])
            continue
        times = [f"{call['call_us']:.0f}", f"{call['peft_us']:.0f}", f"×{_spread(call['over_peft'])}"]
        rows.append([*cells, *times, f"≤ {LAYER_TARGET:.2f}", met_or_missed(call["over_peft"][1], LAYER_TARGET)])
    title = f"A call of a small layer beside PEFT's own: {LAYER_SIZE}→{LAYER_SIZE} r8, fp32 adapters"
    return title, ["layer", "pass", "M", "dtype", "µs", "PEFT, µs", "ratio", "target", ""], rows


def _memory_table(document: Document) -> Table:
    names = list(dict.fromkeys(m["variant"] for m in document["memory"]))
    rows = []
    for shape, p in dict.fromkeys((m["shape"], m["p"]) for m in document["memory"]):
        entries = {m["variant"]: m for m in document["memory"] if (m["shape"], m["p"]) == (shape, p)}
        limit = next(iter(entries.values()))["saved_limit"]
        mine = [m for m in entries.values() if m["backend"]]
        kept = "-" if not mine else "met" if all(m["saved_bytes"] <= limit for m in mine) else "missed"
        cells = [
            "-" if m is None else f"{mib(m['saved_bytes'])} / {mib(m['peak_bytes'])}" for m in map(entries.get, names)
        ]
        rows.append([shape, f"{p:g}", *cells, f"≤ {mib(limit)}", kept])
    title = "Bytes, MiB: saved for the backward (parameters not counted) / most allocated at a time by torch in a step"
    return title, ["", "p", *names, "saved, limit", ""], rows


def closing(document: Document) -> Iterator[str]:
    """Yield the lines after the tables: cells slower than PEFT, the import, noise, variants not measured, notes."""
    compared = [e for e in document["timings"] if e["automatic"] and e["over_peft"]]
    slower = [e for e in compared if e["over_peft"][1] > 1]
    if compared:
        yield f"Slower than PEFT: {len(slower)} of {len(compared)} cells" + (
            ": " + "; ".join(f"{e['shape']} {e['pass']} p={e['p']:g} ({_spread(e['over_peft'])})" for e in slower)
            if slower
            else ""
        )
    cost = document["import"]
    if cost:
        held = "met" if cost["milliseconds"] <= IMPORT_TARGET_MS and not cost["loads_triton"] else "missed"
        triton = "loads Triton" if cost["loads_triton"] else "loads no Triton"
        target = f"target ≤ {IMPORT_TARGET_MS:g} ms: {held}"
        yield f"import lora_kernels after torch: {cost['milliseconds']:.0f} ms ({target}), {triton}"
    yield from noise(document)
    passed_over = {
        (name, reason): None
        for shape in document["shapes"].values()
        for name, reasons in shape["passed_over"].items()
        for reason in reasons
    }
    for name, reason in passed_over:
        yield f"{name} is not measured: {reason}"
    yield from document["notes"]


def noise(document: Document) -> Iterator[str]:
    """Yield how far the floor differs from itself, and a warning if that is much."""
    if document["noise"]:
        lows, _, highs = zip(*(entry["ratio"] for entry in document["noise"]), strict=True)
        yield f"Noise: the floor against itself within a round, widest quartiles: {min(lows):.2f} to {max(highs):.2f}"
        if min(lows) < 1 - NOISY or max(highs) > 1 + NOISY:
            yield "✗ The machine was busy with something else: repeat this on a quiet one before quoting it"


def _spread(values: tuple[float, float, float]) -> str:
    return f"{values[1]:.2f}, quartiles {values[0]:.2f} to {values[2]:.2f}"


def duration(seconds: float) -> str:
    """Return a time in µs or ms, with three digits."""
    value, unit = (seconds * 1e3, "ms") if seconds >= 1e-3 else (seconds * 1e6, "µs")
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}" if value >= 1 else f"{value:.2f} {unit}"


def mib(count: int | None) -> str:
    """Return a number of bytes in MiB, or "-" for None."""
    return "-" if count is None else f"{count / 2**20:.2f}"
