"""Writes README's measured tables and picture from benchmarks/results, each between its markers.

    python scripts/update_readme.py [--check] [RESULT.json ...]

Without names the newest run of each device type (CPU, CUDA) is taken, and the newest of quantised layers and of
generation from folders of their own. ``--check`` changes nothing: exit status 1 where README is stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
BACKWARD = "forward + backward"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where README is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of README.md and benchmarks/results")
    args = parser.parse_args(argv)
    readme, folder = args.root / "README.md", args.root / "benchmarks" / "results"
    old = readme.read_text(encoding="utf-8")
    fresh = _between(old, BEGIN, END, section(args.results or newest(folder), args.root))
    if fresh is None:
        print(f"README.md needs one line {BEGIN} and one line {END} after it")
        return 1
    for name, render in MORE.items():
        found = newest(folder / name)
        text = render(found[0], args.root) if found else "No run on record yet."
        fresh = _between(fresh, f"<!-- {name}:begin -->", f"<!-- {name}:end -->", text) or fresh
    if args.check:
        if fresh != old:
            print("README.md is stale: run python scripts/update_readme.py")
        return int(fresh != old)
    readme.write_text(fresh, encoding="utf-8")
    print("README.md is up to date" if fresh == old else "README.md: tables written")
    return 0


def _between(text: str, begin: str, end: str, fresh: str) -> str | None:
    """`text` with `fresh` between the two markers; None where they are not there once each, in this order."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        return None
    head, rest = text.split(begin)
    return f"{head}{begin}\n{fresh}\n{end}{rest.split(end)[1]}"


def newest(folder: Path) -> list[Path]:
    """Of each device type the run with the latest date inside."""
    best: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        kind = document["device"]["type"]
        best[kind] = max(best.get(kind, ("", path)), (document["date"], path))
    return [best[kind][1] for kind in sorted(best)]


def section(results: list[Path], root: Path) -> str:
    if not results:
        return "No run on record yet: `python -m lora_kernels bench --plot`, then `python scripts/update_readme.py`."
    return "\n\n".join(_one(json.loads(path.read_text(encoding="utf-8")), path, root) for path in results)


def _one(document: dict[str, Any], path: Path, root: Path) -> str:
    return "\n\n".join(
        filter(None, (_heading(document, path, root), _table(document), _picture(path, root), _rest(document)))
    )


def _heading(document: dict[str, Any], path: Path, root: Path) -> str:
    device, versions = document["device"], document["versions"]
    if device["type"] == "cpu":
        name = f"{device['name']} ({device['isa']}), {device['threads']} threads"
    else:
        name = f"{device['name']} ({device['arch']}, driver {device['driver']})"
    peft = f", PEFT {versions['peft']}" if versions["peft"] else ""
    return (
        f"**{name}**, torch {versions['torch']}{peft}, {document['date'][:10]}, median of {document['rounds']} "
        f"interleaved rounds ([all figures]({_link(path, root)})). Forward + backward; × is the ratio to the frozen "
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
        own = [e for e in row.values() if e["backend"]]
        mine = next((e for e in own if e["automatic"]), own[0] if own else None)
        cells = [
            f"{shape}: {document['shapes'][shape]['size']}",
            f"{p:g}",
            f"{row['F.linear']['seconds'][1] * 1e3:.3g} ms",
        ]
        cells += [_ratio(row.get(name)) for name in baselines]
        cells += ["red" if mine is None else f"**{_ratio(mine)}** (`{mine['backend']}`)", _target(mine)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(entry: dict[str, Any] | None) -> str:
    return "-" if entry is None else f"×{entry['ratio'][1]:.2f}"


def _target(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["target"] is None:
        return ""
    met = round(entry["ratio"][1], 2) <= entry["target"]
    return f"≤ {entry['target']:.2f} {'met' if met else 'missed'}"


def _picture(path: Path, root: Path) -> str:
    pictures = {
        "Forward + backward over the frozen layer": path.with_suffix(".png"),
        "Time over the roofline's floor": path.with_name(f"{path.stem}-roofline.png"),
    }
    return "\n\n".join(f"![{text}]({_link(file, root)})" for text, file in pictures.items() if file.exists())


def _rest(document: dict[str, Any]) -> str:
    parts = []
    mine = [m for m in document["memory"] if m["backend"]]
    if mine:
        over = [m for m in mine if m["saved_bytes"] > m["saved_limit"]]
        parts.append(
            "Saved for the backward: never more than x + M·r·itemsize + 64 bytes, dropout or not."
            if not over
            else f"Saved for the backward: above x + M·r·itemsize + 64 bytes in {len(over)} of {len(mine)} cells."
        )
    compared = [e for e in document["timings"] if e["automatic"] and e["over_peft"]]
    if compared:
        slower = [e for e in compared if e["over_peft"][1] > 1]
        where = "; ".join(f"{e['shape']} {e['pass']} p={e['p']:g}, ×{e['over_peft'][1]:.2f}" for e in slower)
        parts.append(
            f"Slower than PEFT in {len(slower)} of {len(compared)} benched cells{f' ({where})' if where else ''}."
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
        parts.append(f"A call of a 128×128 layer beside PEFT's own, where Python is most of it: {told}.")
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
            "The floor measured against itself in the same way (widest quartiles of all cells): "
            f"×{min(r[0] for r in noise):.2f} to ×{max(r[2] for r in noise):.2f}."
        )
    return " ".join(parts)


def quantised(path: Path, root: Path) -> str:
    """A table for each M: time, and the ratio to each of the others in the same round."""
    document = json.loads(path.read_text(encoding="utf-8"))
    device, versions, size = document["device"], document["versions"], document["size"]
    packages = f"torch {versions['torch']}, PEFT {versions['peft']}, bitsandbytes {versions['bitsandbytes']}"
    parts = [
        f"**{device['name']} ({device['isa']}), {device['threads']} threads**, {packages}, {document['date'][:10]}, "
        f"{size['K']}→{size['N']} r{size['R']}, median of {document['rounds']} interleaved rounds over "
        f"{document['sets']} sets of weights ([all figures]({_link(path, root)})). Every row of ours stands behind a "
        "check of its values and gradients."
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


def generation(path: Path, root: Path) -> str:
    """Tokens per second of each model, and the speed beside PEFT over bitsandbytes in the same round."""
    document = json.loads(path.read_text(encoding="utf-8"))
    device, versions, size = document["device"], document["versions"], document["size"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    peer = next((row["name"] for row in document["rows"] if row["name"].startswith("PEFT + bitsandbytes ")), "")
    lines = [
        f"**{device['name']} ({device['isa']}), {device['threads']} threads**, {packages}, {document['date'][:10]}: a "
        f"Llama of {size['layers']} layers, hidden {size['hidden']}, r{size['r']} on all linears, random weights; a "
        f"prompt of {size['prompt']} tokens, {size['new']} new ones, median of {document['rounds']} interleaved rounds "
        f"([all figures]({_link(path, root)})). Every model's logits stand behind a check against fp64.",
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


def _link(path: Path, root: Path) -> str:
    path = path.resolve()
    return path.relative_to(root.resolve()).as_posix() if path.is_relative_to(root.resolve()) else path.name


MORE = {"quantised": quantised, "generation": generation}
"""What else is written, by the name of its markers and of its folder in benchmarks/results."""

if __name__ == "__main__":
    sys.exit(main())
