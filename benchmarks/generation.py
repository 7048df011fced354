"""Tokens per second of transformers' ``generate`` over nf4 weights, on the CPU. Run it from the checkout:

    python -m benchmarks.generation [--dtype bf16|fp32] [--rounds N] [--json benchmarks/results/generation/FILE.json]

The model is a Llama with random weights; it decodes one sequence greedily, with a cache of keys and values. The same
model with the same adapters is measured as

    PEFT + bitsandbytes          from ``from_pretrained(quantization_config=BitsAndBytesConfig(...))`` and PEFT
    PEFT + bitsandbytes, fused   the same after ``lora_kernels.fuse(model)``
    apply_lora(quant="nf4")      a plain model, without PEFT and bitsandbytes
    PEFT, dense                  over dense weights with the values of the nf4 weights, in bf16 and in fp32

Before anything is timed, the logits of each model are compared with fp64, for the prompt and for each token after it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.closing import close, lacks
from benchmarks.generation_models import DENSE, PEER, Models, Size, Variant, seeded
from lora_kernels.testing import documents, judge, machine, timing
from lora_kernels.testing.names import SHORT
from lora_kernels.testing.terminal import Terminal, terminal

DTYPES = {SHORT[dtype]: dtype for dtype in (torch.bfloat16, torch.float32)}


@dataclass(frozen=True)
class Row:
    """The numbers of one model: quartiles over rounds. Each ratio is time / another model's time in the same round."""

    name: str
    tokens_per_second: tuple[float, float, float]
    seconds: tuple[float, float, float]
    """Seconds of one ``generate``, with the prompt."""
    ratios: dict[str, tuple[float, float, float]]
    weight_bytes: int
    """Bytes of the frozen weights of the layers with adapters, before the first call."""


def measure(
    size: Size, dtype: torch.dtype, rounds: int, show: Terminal, *, double_quant: bool = False, dense: bool = True
) -> dict[str, Any]:
    """Return the document: what the judge found, then a row for each model, timed interleaved.

    It needs transformers and PEFT, and bitsandbytes and accelerate for the rows of bitsandbytes. Without `dense` the
    dense model in the other dtype, which is there for comparison only, is left out.
    """
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    document: dict[str, Any] = documents.begin(torch.device("cpu"), packages) | {
        "size": asdict(size),
        "dtype": SHORT[dtype],
        "double_quant": double_quant,
        "rounds": rounds,
        "notes": [],
        "gate": [],
        "rows": [],
    }
    if absent := [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]:
        document["notes"].append(f"{PEER} is not measured, fused or not: pip install {' '.join(absent)}")
    elif "avx512_bf16" in machine.cpu_isa() and importlib.util.find_spec("kernels") is None:
        document["notes"].append(
            "bitsandbytes runs its own kernels; with the package kernels it would fetch others for this processor"
        )
    floors = [dtype, *(other for other in DTYPES.values() if dense and other != dtype)]
    steps = 1 + len(floors) + (0 if absent else 2) + 2 + rounds
    with show.progress(steps) as advance, tempfile.TemporaryDirectory() as checkpoint:
        models = Models(checkpoint, size, double_quant)
        advance("builds the models", 1)
        variants = [models.apply(dtype)]
        advance(variants[-1].name, 1)
        for other in floors:
            variants.append(models.dense(other))
            advance(variants[-1].name, 1)
        for fused in () if absent else (False, True):
            variants.append(models.over_bnb(dtype, fused))
            advance(variants[-1].name, 1)
        tokens = torch.randint(size.vocabulary, (1, size.prompt + size.new), generator=seeded())
        document["gate"] = _judge(variants, dtype, tokens, size.prompt, models.exact())
        advance("judges the logits", 1)
        models.weights.clear()
        gc.collect()
        if any(entry["faults"] for entry in document["gate"]):
            return document
        run: dict[str, list[Callable[[], object]]] = {
            v.name: [functools.partial(generate, v.model, tokens[:, : size.prompt], size.new)] for v in variants
        }
        floor = f"{DENSE if absent else PEER} {SHORT[dtype]}"
        taken = timing.interleave(floor, run, rounds, timing.CpuTimer(), functools.partial(advance, "generate", 1))
    document["rows"] = [asdict(_row(v, taken, size, dtype)) for v in variants]
    return document


def generate(model: Any, prompt: Tensor, new: int, **more: Any) -> Tensor:
    """Return `prompt` [rows, tokens] and `new` tokens after it, chosen greedily. Raises RuntimeError if there are
    fewer. `more` is passed to the model."""
    with torch.no_grad():
        settings = {"max_new_tokens": new, "do_sample": False, "use_cache": True}
        tokens = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings, **more)
    if tokens.shape[1] != prompt.shape[1] + new:
        raise RuntimeError(f"generate gave {tokens.shape[1] - prompt.shape[1]} new tokens, asked for {new}")
    return tokens


@torch.no_grad()
def logits(model: Any, tokens: Tensor, prompt: int, **more: Any) -> dict[str, Tensor]:
    """Return the logits of `tokens` [rows, T], as ``generate`` computes them: the first `prompt` at once, the others
    singly. `more` is passed to the model."""
    out = model(input_ids=tokens[:, :prompt], use_cache=True, **more)
    found = {"prompt": out.logits.flatten(0, 1)}
    single = []
    for i in range(prompt, tokens.shape[1]):
        out = model(input_ids=tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True, **more)
        single.append(out.logits.flatten(0, 1))
    return found | {"single tokens": torch.cat(single)}


def _judge(
    variants: list[Variant], dtype: torch.dtype, tokens: Tensor, prompt: int, exact: nn.Module
) -> list[dict[str, Any]]:
    """Return the entries under "gate". By the rule of `judge`, ours must be as good as the dense model in the same
    dtype and as bitsandbytes. Theirs must be the same function up to rounding."""
    want = logits(exact, tokens, prompt)
    got = {v.name: logits(v.model, tokens, prompt) for v in variants}
    others = [v.name for v in variants if not v.ours and v.dtype == dtype]
    entries = []
    for v in variants:
        faults = peer_faults(got[v.name], want) if not v.ours else []
        for part, value in got[v.name].items() if v.ours else ():
            for other in others:
                verdict = judge.against_plain(part, value, want[part], got[other][part])
                finite = bool(torch.isfinite(value).all())
                if verdict.fault or not finite:
                    faults.append(f"{verdict.fault or f'{part}: not finite'} (by {other})")
        faults += [f"a call was left to PEFT: {why}" for why in passed_over(v.model)]
        entries.append({"name": v.name, "errors": relative_errors(got[v.name], want), "faults": faults})
    return entries


def peer_faults(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    """Return why a model cannot be compared with: logits further than 10% (RMS) from fp64."""
    found = relative_errors(got, want).items()
    return [f"{part}: {100 * error:.3g}% (RMS) from fp64" for part, error in found if not error <= 0.1]


def relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Return RMS errors, relative to the RMS of the truth."""
    return {part: ((got[part].double() - t).norm() / t.norm()).item() for part, t in want.items()}


def passed_over(model: nn.Module) -> list[str]:
    """Return the reasons why fused layers have left calls to PEFT."""
    return sorted({str(why) for layer in model.modules() for why in getattr(layer, "passed_over", ())})


def _row(v: Variant, taken: timing.Rounds, size: Size, dtype: torch.dtype) -> Row:
    seconds = taken.seconds(v.name)
    others = [
        other for other in (f"{PEER} {SHORT[dtype]}", *(f"{DENSE} {short}" for short in DTYPES)) if other != v.name
    ]
    return Row(
        v.name,
        timing.quartiles([size.new / each for each in seconds]),
        timing.quartiles(seconds),
        {other: timing.quartiles(taken.ratios(v.name, other)) for other in others if other in taken.repeats},
        v.weight_bytes,
    )


def table(document: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Return the table of a document: (title, header, rows)."""
    size = document["size"]
    title = (
        f"generate, {size['new']} tokens after {size['prompt']}: Llama, {size['layers']} layers, {size['hidden']} → "
        f"{size['intermediate']}, r{size['r']}, nf4{' with double quantisation' if document['double_quant'] else ''}, "
        f"{document['device']['threads']} threads"
    )
    errors = {entry["name"]: entry["errors"] for entry in document["gate"]}
    rows = []
    for row in sorted(document["rows"], key=lambda row: -row["tokens_per_second"][1]):
        low, middle, high = row["tokens_per_second"]
        ratios = [f"×{1 / value[1]:.2f} {other}" for other, value in row["ratios"].items()]
        cells = [row["name"], f"{middle:.1f} ({low:.1f} to {high:.1f})", "; ".join(ratios)]
        error = max(errors[row["name"]].values())
        rows.append([*cells, f"{row['weight_bytes'] / 2**20:,.0f} MiB", f"{error:.1e}"])
    return title, ["model", "tokens/s", "speed beside", "weights", "error of logits"], rows


def main(argv: list[str] | None = None) -> int:
    """Run the command. Return 0; 1 if the judge found a fault; 2 if nothing can be measured."""
    size = Size()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, value in asdict(size).items():
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default: {value}")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the model, and of products with nf4")
    parser.add_argument("--double-quant", action="store_true", help="quantise the scales too")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="the JSON to write")
    args = parser.parse_args(argv)
    for name in (*asdict(size), "rounds", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
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
    size = Size(**{name: getattr(args, name) for name in asdict(size)})
    document = measure(size, DTYPES[args.dtype], args.rounds, show, double_quant=args.double_quant)
    if document["rows"]:
        show.table(*table(document), words=True)
    return close(document, args.json, show)


if __name__ == "__main__":
    raise SystemExit(main())
