"""The tables of docs/measuring.md, rendered from the documents in benchmarks/results."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BACKWARD = "forward + backward"
NO_RUN = "No run on record yet: `python -m lora_kernels bench --plot`, then `python scripts/update_readme.py`."


@dataclass(frozen=True)
class Run:
    """A document and the page that shows it."""

    document: dict[str, Any]
    path: Path
    page: Path
    root: Path
    """The folder of the checkout."""

    @classmethod
    def read(cls, path: Path, page: Path, root: Path) -> Run:
        return cls(json.loads(path.read_text(encoding="utf-8")), path, page, root)

    def link(self, path: Path | None = None) -> str:
        """Return the path of the document or another file, from the page; only its name if it is outside the
        checkout."""
        target = (path or self.path).resolve()
        if not target.is_relative_to(self.root.resolve()):
            return target.name
        return Path(os.path.relpath(target, self.page.resolve().parent)).as_posix()

    def machine(self) -> str:
        device = self.document["device"]
        if device["type"] == "cpu":
            return f"{device['name']}, {device['threads']} threads"
        return f"{device['name']} ({device['arch']})"


Runs = dict[str, list[Run]]
"""The runs that are shown, by kind: bench, quantised, generation, many, generation_many, gpu."""


def chosen(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the entry of the automatic choice, or of another of our back-ends if that was not measured."""
    own = [e for e in entries if e["backend"]]
    return next((e for e in own if e["automatic"]), own[0] if own else None)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def bench(runs: Runs) -> str:
    return "\n\n".join(map(_one, runs["bench"])) or NO_RUN


def _one(run: Run) -> str:
    return "\n\n".join(filter(None, (_heading(run), _table(run.document), _pictures(run), _rest(run.document))))


def _heading(run: Run) -> str:
    document = run.document
    device, versions = document["device"], document["versions"]
    if device["type"] == "cpu":
        name = f"{device['name']} ({device['isa']}), {device['threads']} threads"
    else:
        name = f"{device['name']} ({device['arch']}, driver {device['driver']})"
    peft = f", PEFT {versions['peft']}" if versions["peft"] else ""
    return (
        f"**{name}**, torch {versions['torch']}{peft}, {document['date'][:10]}, median of {document['rounds']} "
        f"interleaved rounds ([all numbers]({run.link()})). Forward + backward; × is the ratio to the frozen "
        "layer (`F.linear` with dx only) in the same round. Every row stands behind a check of its values and "
        "gradients in the same run."
    )


def _table(document: dict[str, Any]) -> str:
    entries = [e for e in document["timings"] if e["pass"] == BACKWARD]
    baselines = [name for name in ("PEFT", "addmm_", "merge") if any(e["variant"] == name for e in entries)]
    lines = [
        "| layer | p | `F.linear` | " + "".join(f"{name} | " for name in baselines) + "**ours** | target |",
        "|---|---|---|" + "---|" * len(baselines) + "---|---|",
    ]
    for shape, p in dict.fromkeys((e["shape"], e["p"]) for e in entries):
        row = {e["variant"]: e for e in entries if (e["shape"], e["p"]) == (shape, p)}
        mine = chosen(list(row.values()))
        cells = [
            f"{shape}: {document['shapes'][shape]['size']}",
            f"{p:g}",
            f"{row['F.linear']['seconds'][1] * 1e3:.3g} ms",
        ]
        cells += [ratio(row.get(name)) for name in baselines]
        cells += ["red" if mine is None else f"**{ratio(mine)}** (`{mine['backend']}`)", _target(mine)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio(entry: dict[str, Any] | None) -> str:
    return "-" if entry is None else f"×{entry['ratio'][1]:.2f}"


def _target(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["target"] is None:
        return ""
    met = round(entry["ratio"][1], 2) <= entry["target"]
    return f"≤ {entry['target']:.2f} {'met' if met else 'missed'}"


def _pictures(run: Run) -> str:
    pictures = {
        "Forward + backward over the frozen layer": run.path.with_suffix(".png"),
        "Time over the roofline's floor": run.path.with_name(f"{run.path.stem}-roofline.png"),
    }
    return "\n\n".join(f"![{text}]({run.link(file)})" for text, file in pictures.items() if file.exists())


def _rest(document: dict[str, Any]) -> str:
    parts = []
    mine = [m for m in document["memory"] if m["backend"]]
    if mine:
        over = [m for m in mine if m["saved_bytes"] > m["saved_limit"]]
        bound = "x + M·r·(adapter bytes) + 64 bytes"
        parts.append(
            f"Saved for the backward: at most {bound}, with and without dropout."
            if not over
            else f"Saved for the backward: above {bound} in {len(over)} of {len(mine)} cells."
        )
    compared = [e for e in document["timings"] if e["automatic"] and e["over_peft"]]
    if compared:
        slower = [e for e in compared if e["over_peft"][1] > 1]
        where = "; ".join(f"{e['shape']} {e['pass']} p={e['p']:g}, ×{e['over_peft'][1]:.2f}" for e in slower)
        parts.append(
            f"Slower than PEFT in {len(slower)} of {len(compared)} measured cells{f' ({where})' if where else ''}."
        )
    calls = [o["overhead_us"] for o in document["overhead"] if not o["grad"] and not o["p"]]
    if calls:
        parts.append(f"A forward call costs {max(calls):.0f} µs beside its kernels.")
    small = [call for call in document.get("layer_calls", []) if call["over_peft"]]
    if small:
        told = "; ".join(
            f"{call['layer']}, {call['which']} {call['dtype']} M = {call['M']}: ×{call['over_peft'][1]:.2f}"
            for call in small
        )
        parts.append(f"A call of a 128×128 layer beside PEFT's own, where Python takes most of the time: {told}.")
    if document["import"]:
        parts.append(f"The import takes {document['import']['milliseconds']:.0f} ms after torch's.")
    rates = document.get("roofline")
    reached = [
        e["floor"]["seconds"] / e["seconds"][1] for e in document["timings"] if e["automatic"] and e.get("floor")
    ]
    if rates and reached:
        gemm = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates["gemm"].items())
        parts.append(
            f"Roofline, measured in the same run: GEMM {gemm}; copy {rates['copy'] / 1e9:.3g} GB/s. Ours reaches "
            f"{100 * min(reached):.0f} to {100 * max(reached):.0f}% of it."
        )
    noise = [entry["ratio"] for entry in document["noise"]]
    if noise:
        parts.append(
            "The frozen layer measured against itself in the same way (widest quartiles of all cells): "
            f"×{min(r[0] for r in noise):.2f} to ×{max(r[2] for r in noise):.2f}."
        )
    return " ".join(parts)


def quantised(runs: Runs) -> str:
    return "\n\n".join(map(_quantised, runs["quantised"][:1])) or "No run on record yet."


def _quantised(run: Run) -> str:
    """Return a table for each M: time, and the ratio to each of the others in the same round."""
    document = run.document
    device, versions, size = document["device"], document["versions"], document["size"]
    packages = f"torch {versions['torch']}, PEFT {versions['peft']}, bitsandbytes {versions['bitsandbytes']}"
    parts = [
        f"**{device['name']} ({device['isa']}), {device['threads']} threads**, {packages}, {document['date'][:10]}, "
        f"{size['K']}→{size['N']} r{size['R']}, median of {document['rounds']} interleaved rounds over "
        f"{document['sets']} sets of weights ([all numbers]({run.link()})). Every row of ours stands behind a check "
        "of its values and gradients."
    ]
    for M in dict.fromkeys(row["M"] for row in document["rows"]):
        what = "a decoding step, M = 1" if M == 1 else f"forward + backward, M = {M}"
        lines = [f"| {what} | time | of `F.linear` | of PEFT + bitsandbytes | target |", "|---|---|---|---|---|"]
        for row in (row for row in document["rows"] if row["M"] == M):
            short = row["name"].rpartition(" ")[2]
            own = not row["name"].startswith(("F.linear", "PEFT"))
            name = f"**{row['name']}**" if own else row["name"]
            floor = "; ".join(f"×{q[1]:.2f} {to[9:]}" for to, q in row["ratios"].items() if to.startswith("F.linear"))
            peer = row["ratios"].get(f"PEFT + bitsandbytes {short}")
            met = [
                f"≤ {most:.2f} of {to} {'met' if round(row['ratios'][to][1], 2) <= most else 'missed'}"
                for to, most in row["targets"].items()
            ]
            cells = [name, f"{row['seconds'][1] * 1e3:.3g} ms", floor or "-", f"×{peer[1]:.2f}" if peer else "-"]
            lines.append("| " + " | ".join([*cells, "; ".join(met)]) + " |")
        parts.append("\n".join(lines))
    memory = [
        f"{e['mb']:.1f} MB ({e['name']}, M = {e['M']}; ≤ {e['most']:.0f} {'met' if e['mb'] <= e['most'] else 'missed'})"
        for e in document.get("memory", [])
    ]
    if memory:
        what = "A first training step's peak memory beyond weights, activations and gradients"
        parts.append(f"{what}: {', '.join(memory)}.")
    return "\n\n".join(parts)


def generation(runs: Runs) -> str:
    return "\n\n".join(map(_generation, runs["generation"][:1])) or "No run on record yet."


def _generation(run: Run) -> str:
    """Return tokens per second of each model, and the speed beside PEFT over bitsandbytes in the same round."""
    document = run.document
    device, versions, size = document["device"], document["versions"], document["size"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    peer = next((row["name"] for row in document["rows"] if row["name"].startswith("PEFT + bitsandbytes ")), "")
    lines = [
        f"**{device['name']} ({device['isa']}), {device['threads']} threads**, {packages}, {document['date'][:10]}: a "
        f"Llama of {size['layers']} layers, hidden {size['hidden']}, r{size['r']} on all linears, random weights; a "
        f"prompt of {size['prompt']} tokens, {size['new']} new ones, median of {document['rounds']} interleaved rounds "
        f"([all numbers]({run.link()})). Every model's logits stand behind a check against fp64.",
        "",
        "| model | tokens/s | speed beside PEFT + bitsandbytes | frozen weights |",
        "|---|---|---|---|",
    ]
    for row in sorted(document["rows"], key=lambda row: -row["tokens_per_second"][1]):
        ratio = row["ratios"].get(peer)
        beside = f"×{1 / ratio[1]:.2f}" if ratio else "-"
        own = row["name"].startswith("apply_lora") or ", fused" in row["name"]
        name = f"**{row['name']}**" if own else row["name"]
        lines.append(
            f"| {name} | {row['tokens_per_second'][1]:.1f} | {beside} | {row['weight_bytes'] / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)
