"""Tables of the suite `hopper`: geometric means over the projections of Llama 3.1, beside their targets."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lora_kernels.bench.report import Document, Table, met_or_missed
from lora_kernels.bench.shapes import BACKWARD, FORWARD, GRAPH

_PEFT_DEFAULT = "PEFT, fp32 adapters"
_FLOOR = "F.linear"
DECODE_TARGET = 1.10

# Title, variant, variant to divide by, pass, p, sign of the target, target by rank. None stands for our back-end.
_ROWS: tuple[tuple[str, str | None, str | None, str, float, str, dict[int, float]], ...] = (
    ("forward over F.linear", None, _FLOOR, FORWARD, 0.0, "≤", {16: 1.05, 64: 1.08}),
    ("forward + backward over F.linear + dx", None, _FLOOR, BACKWARD, 0.0, "≤", {16: 1.10, 64: 1.15}),
    ("forward + backward over F.linear + dx, p=0.05", None, _FLOOR, BACKWARD, 0.05, "≤", {}),
    ("PEFT (fp32 adapters, p=0.05) over ours, fwd + bwd", _PEFT_DEFAULT, None, BACKWARD, 0.05, "≥", {16: 1.4, 64: 1.4}),
    ("PEFT (16-bit adapters, p=0.05) over ours, fwd + bwd", "PEFT", None, BACKWARD, 0.05, "≥", {}),
    ("addmm_ over ours, forward", "addmm_", None, FORWARD, 0.0, "≥", {16: 1.05, 64: 1.05}),
    ("addmm_ over ours, fwd + bwd", "addmm_", None, BACKWARD, 0.0, "≥", {16: 1.05, 64: 1.05}),
    ("LoRAFusion over ours, fwd + bwd, p=0.05", "lorafusion", None, BACKWARD, 0.05, "≥", {16: 1.05, 64: 1.05}),
    ("unsloth over ours, fwd + bwd", "unsloth", None, BACKWARD, 0.0, "≥", {}),
)


def tables(document: Document) -> Iterator[Table]:
    """Yield a table for each of our back-ends and one for decoding, if the document is a run of this suite."""
    if document.get("suite") != "hopper":
        return
    for name in dict.fromkeys(e["variant"] for e in document["timings"] if e["backend"]):
        rows = []
        for title, what, over, which, p, sign, targets in _ROWS:
            cells = []
            for rank in (16, 64):
                cells += _cells(document, rank, which, p, what or name, over or name, sign, targets.get(rank))
            rows.append([title, *cells])
        header = ["geometric means", "r=16", "of", "target", "", "r=64", "of", "target", ""]
        yield f"Llama 3.1 8B and 70B, {name}", header, rows
    decode = [e for e in document["timings"] if e["pass"] == GRAPH and e["backend"]]
    if decode:
        rows = []
        for e in decode:
            ratio = e["ratio"][1]
            aim, held = f"≤ {DECODE_TARGET:.2f}", met_or_missed(ratio, DECODE_TARGET)
            rows.append([e["shape"], e["variant"], f"×{ratio:.2f}", aim, held])
        yield "Decoding in a CUDA graph, over F.linear", ["", "variant", "ratio", "target", ""], rows


def _cells(
    document: Document, rank: int, which: str, p: float, what: str, over: str, sign: str, target: float | None
) -> list[str]:
    """Return the cells of a mean: the mean, the number of shapes in it, its target and whether it is met."""
    shapes = {name for name, each in document["shapes"].items() if each["R"] == rank and name.startswith("llama-")}
    times: dict[tuple[str, str], float] = {
        (e["shape"], e["variant"]): e["seconds"][1]
        for e in document["timings"]
        if e["shape"] in shapes and e["pass"] == which and e["p"] == p
    }
    ratios = [times[s, what] / times[s, over] for s in shapes if (s, what) in times and (s, over) in times]
    aim = "" if target is None else f"{sign} {target:.2f}"
    if not ratios:
        return ["-", f"0/{len(shapes)}", aim, ""]
    mean = round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 2)
    met = target is None or (mean <= target if sign == "≤" else mean >= target)
    held = "" if target is None else "met" if met else "missed"
    return [f"×{mean:.2f}", f"{len(ratios)}/{len(shapes)}", aim, held]
