"""Tokens per second of transformers' ``generate`` where each row of the batch has its own adapter. Run it from the
checkout:

    python -m benchmarks.generation_many [--rounds N] [--json FILE] [--plot]

It writes benchmarks/results/generation_many/<date>-<machine>.json, or FILE. The model is a Llama with random weights
and 32 adapters on all of its linears, of ranks 16, 8, 32 and 64 in turn. It decodes 16 rows greedily, or 32 rows where
32 adapters are used, with a cache of keys and values:

    base         the model without adapters
    PEFT         ``generate(adapter_names=...)``, one name for each row
    PEFT, fused  the same call after ``lora_kernels.fuse(model)``

All three read the same weights. Before anything is timed, the logits of each are compared with fp64, for the prompt and
for each token after it.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import generation_many_plot
from benchmarks.closing import close, lacks
from benchmarks.generation import generate, logits, passed_over, peer_faults, relative_errors
from benchmarks.generation_many_models import ADAPTERS, BASE, FUSED, PEFT, Models
from benchmarks.generation_models import Size, seeded
from lora_kernels.testing import documents, judge, machine, timing
from lora_kernels.testing.terminal import Terminal, terminal

COUNTS = {1: 16, 4: 16, 8: 16, 32: 32}
"""The rows of the batch, by the number of adapters in it."""
TARGETS = {8: 0.88}
"""The least speed of the fused model beside the base's, by the number of adapters."""
SIZE = Size(layers=2, new=16)
RESULTS = Path("benchmarks/results/generation_many")


def measure(size: Size, rounds: int, show: Terminal) -> dict[str, Any]:
    """Return the document: for each number of adapters what the judge found, then a row for each model, timed
    interleaved. It needs transformers and PEFT."""
    document: dict[str, Any] = documents.begin(torch.device("cpu"), ("torch", "transformers", "peft")) | {
        "size": asdict(size),
        "adapters": ADAPTERS,
        "rounds": rounds,
        "notes": [],
        "gate": [],
        "rows": [],
    }
    with show.progress(len(COUNTS) * (1 + rounds)) as advance, tempfile.TemporaryDirectory() as checkpoint:
        advance("builds the models", 0)
        models = Models(checkpoint, size)
        for n, rows in COUNTS.items():
            ids = torch.arange(n).repeat_interleave(rows // n)[torch.randperm(rows, generator=seeded())]
            tokens = torch.randint(size.vocabulary, (rows, size.prompt + size.new), generator=seeded())
            advance(f"{n} adapters: judges the logits", 1)
            entries = _judge(models, n, ids, tokens, size.prompt)
            document["gate"] += entries
            if any(entry["faults"] for entry in entries):
                continue
            done = functools.partial(advance, f"{n} adapters: generate", 1)
            document["rows"] += _time(models, n, ids, tokens[:, : size.prompt], size.new, rounds, done)
    return document


def _names(name: str, ids: Tensor) -> dict[str, Any]:
    """Return what a model is called with beside the tokens."""
    return {} if name == BASE else {"adapter_names": [str(i) for i in ids.tolist()]}


def _judge(models: Models, n: int, ids: Tensor, tokens: Tensor, prompt: int) -> list[dict[str, Any]]:
    """Return the entries under "gate" for a number of adapters. By the rule of `judge`, ours must be as good as PEFT;
    PEFT must be the same function up to rounding."""
    want = logits(models.exact(ids), tokens, prompt)
    got = {name: logits(models.by_name[name], tokens, prompt, **_names(name, ids)) for name in (PEFT, FUSED)}
    faults = {PEFT: peer_faults(got[PEFT], want), FUSED: [f"left to PEFT: {why}" for why in passed_over(models.fused)]}
    for part, value in got[FUSED].items():
        fault = judge.against_plain(part, value, want[part], got[PEFT][part]).fault
        faults[FUSED] += [fault] if fault else [] if torch.isfinite(value).all() else [f"{part}: not finite"]
    return [
        {"name": f"{name}, {n} adapters", "errors": relative_errors(got[name], want), "faults": faults[name]}
        for name in got
    ]


def _time(
    models: Models, n: int, ids: Tensor, prompt: Tensor, new: int, rounds: int, done: Callable[[], object]
) -> list[dict[str, Any]]:
    """Return a row for each model: quartiles over rounds of tokens per second, and of its speed beside the base's."""
    run: dict[str, list[timing.Step]] = {
        name: [functools.partial(generate, model, prompt, new, **_names(name, ids))]
        for name, model in models.by_name.items()
    }
    taken = timing.interleave(BASE, run, rounds, timing.CpuTimer(), done)
    rows = []
    for name in run:
        speeds = [1 / ratio for ratio in taken.ratios(name, BASE)]
        row: dict[str, Any] = {
            "n": n,
            "batch": prompt.shape[0],
            "name": name,
            "tokens_per_second": timing.quartiles([prompt.shape[0] * new / each for each in taken.seconds(name)]),
            "of_base": timing.quartiles(speeds),
        }
        if name == FUSED:
            row |= {"of_peft": timing.quartiles([1 / ratio for ratio in taken.ratios(name, PEFT)])}
            row |= {"target": TARGETS.get(n)}
        rows.append(row)
    return rows


def table(document: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Return the table of a document: (title, header, rows)."""
    size = document["size"]
    title = (
        f"generate with an adapter for each row, {size['new']} tokens after {size['prompt']}: Llama, {size['layers']} "
        f"layers, {size['hidden']} → {size['intermediate']}, fp32, {document['device']['threads']} threads"
    )
    rows = []
    for row in document["rows"]:
        low, middle, high = row["tokens_per_second"]
        cells = [f"{row['batch']} rows, {row['n']} adapters", row["name"], f"{middle:.1f} ({low:.1f} to {high:.1f})"]
        rows.append([*cells, f"{row['of_base'][1]:.2f}", target_words(row)])
    return title, ["", "model", "tokens/s", "of the base's", "target"], rows


def target_words(row: dict[str, Any]) -> str:
    """Return the target of a row and whether it is met; empty without a target."""
    if row.get("target") is None:
        return ""
    return f"≥ {row['target']:.2f} {'met' if round(row['of_base'][1], 2) >= row['target'] else 'missed'}"


def main(argv: list[str] | None = None) -> int:
    """Run the command. Return 0; 1 if the judge found a fault; 2 if nothing can be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation_many",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in (field for field in asdict(SIZE) if field != "r"):
        value = getattr(SIZE, name)
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default: {value}")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="PATH", help=f"the JSON to write (default: {RESULTS}/...)")
    parser.add_argument("--plot", action="store_true", help="draw a PNG beside the JSON")
    args = parser.parse_args(argv)
    chosen = {name: getattr(args, name) for name in asdict(SIZE) if name != "r"}
    for name, value in (chosen | {"rounds": args.rounds, "threads": args.threads}).items():
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.hidden % (2 * args.heads):
        parser.error(f"--hidden must be a multiple of 2 · heads = {2 * args.heads}, got {args.hidden}")
    show = terminal()
    if lacks(show, "transformers", "peft"):
        return 2
    from transformers.utils import logging

    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    document = measure(Size(**chosen), args.rounds, show)
    if document["rows"]:
        show.table(*table(document), words=True)
    out = args.json or RESULTS / f"{document['date'][:10]}-{machine.kind(document['device'])}.json"
    status = close(document, out, show)
    if args.plot and document["rows"]:
        generation_many_plot.draw(document, out.with_suffix(".png"))
        show.line(f"Drawn: {out.with_suffix('.png')}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
