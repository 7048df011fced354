"""Times of a layer over a quantised base, in decoding one token and in training, on the CPU. Run it from the checkout:

    python -m benchmarks.quantised [--rounds N] [--out benchmarks/results/quantised/DATE-MACHINE.json]

The layer is measured beside F.linear on the dense weight, the dense fused layer, and PEFT over bitsandbytes'
Linear4bit. Each variant goes through several weights in turn, so that no weight is in a cache when its turn comes, as
in a model.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import quantised_memory
from benchmarks.closing import close
from lora_kernels.bench import layers, report
from lora_kernels.bench.layers import Task
from lora_kernels.bench.shapes import BACKWARD, FORWARD
from lora_kernels.ops.linear import lora_linear
from lora_kernels.quant.weight import QuantizedWeight, quantize_weight
from lora_kernels.testing import documents, judge, timing
from lora_kernels.testing.names import SHORT
from lora_kernels.testing.terminal import terminal

N = K = 4096
R = 16
DECODE, TRAINING = 1, 512
"""Rows of x."""
SETS = 4
"""The number of weights that each variant goes through."""
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "fp8": ("fp8", {}),
    "nf4": ("nf4", {}),
    "nf4, double_quant": ("nf4", {"double_quant": True}),
}
TARGETS = {
    (DECODE, "dense", "fp32"): [("F.linear fp32", 0.65)],
    (DECODE, "dense", "bf16"): [("F.linear bf16", 0.60)],
    (DECODE, "int8", "fp32"): [("F.linear fp32", 0.35)],
    (DECODE, "nf4", "fp32"): [("F.linear fp32", 0.22), ("PEFT + bitsandbytes fp32", 0.50)],
    (DECODE, "nf4", "bf16"): [("F.linear bf16", 0.40), ("PEFT + bitsandbytes bf16", 0.50)],
    (TRAINING, "nf4", "fp32"): [("F.linear fp32", 1.15)],
}
"""The most time that a layer may take, as a ratio to another variant: (M, format, dtype of x) → [(variant, ratio)]."""


@dataclass(frozen=True)
class Row:
    """The numbers of one variant: quartiles over rounds. Each ratio is to another variant in the same round."""

    M: int
    name: str
    seconds: tuple[float, float, float]
    ratios: dict[str, tuple[float, float, float]]
    targets: dict[str, float]


def measure(size: tuple[int, int, int], rows: tuple[int, ...], rounds: int, show: Any) -> dict[str, Any]:
    """Return the document for layers of `size` (N, K, R) and each number of `rows` of x. The judge comes first; a
    variant of ours with a fault leaves its M without numbers."""
    document: dict[str, Any] = documents.begin(torch.device("cpu"), ("torch", "peft", "bitsandbytes")) | {
        "size": dict(zip("NKR", size, strict=True)),
        "sets": SETS,
        "rounds": rounds,
        "notes": [],
        "gate": [],
        "rows": [],
        "memory": [],
    }
    if not _peer():
        document["notes"].append("PEFT over bitsandbytes is not measured: pip install peft bitsandbytes")
    with show.progress(len(rows) * rounds) as advance:
        for M in rows:
            steps, faults = _variants(M, *size)
            document["gate"] += faults
            if not any(entry["faults"] for entry in faults):
                taken = timing.interleave(
                    "F.linear fp32", steps, rounds, timing.CpuTimer(), functools.partial(advance, f"M = {M}", 1)
                )
                document["rows"] += [asdict(_row(M, name, taken)) for name in steps]
    if sys.platform.startswith("linux"):
        document["memory"] = [
            {
                "name": f"nf4 {SHORT[dtype]}",
                "M": M,
                "mb": quantised_memory.measure(str(dtype).removeprefix("torch."), M, *size[:2]),
                "most": quantised_memory.MOST,
            }
            for M in rows
            if M != DECODE
            for dtype in (torch.float32, torch.bfloat16)
        ]
    return document


def _variants(M: int, N: int, K: int, R: int) -> tuple[dict[str, list[Callable[[], object]]], list[dict[str, Any]]]:
    """Return the steps of each variant, one for each set of weights, and the judge's entries on our variants over
    quantised weights."""
    training = M != DECODE
    which = BACKWARD if training else FORWARD
    steps: dict[str, list[Callable[[], object]]] = {}
    verdicts = []
    for number in range(SETS):
        q = judge.problem(M, N, K, R, bias=False, seed=number)
        quantised = {name: quantize_weight(q.w, format, **more) for name, (format, more) in FORMATS.items()}
        for dtype in (torch.float32, torch.bfloat16):
            p, short = replace(q.to(dtype), w=q.w.to(dtype)), SHORT[dtype]
            a, b = (t.detach().requires_grad_(training) for t in (p.a, p.b))
            ours: dict[str, Tensor | QuantizedWeight] = {"dense": p.w} | quantised
            tasks = {f"F.linear {short}": layers.frozen(p)}
            for name, w in ours.items():
                tasks[f"{name} {short}"] = _ours(w, a, b, q.scale)
            if _peer():
                layer = _peer_layer(q.w, p, training)
                trained = tuple(t for t in layer.parameters() if t.requires_grad)
                tasks[f"PEFT + bitsandbytes {short}"] = Task(layer, trained, ())
            for name, task in tasks.items():
                steps.setdefault(name, []).append(layers.step(task, p, which))
            if not number:
                verdicts += [_judge(M, name, w, replace(p, w=q.w), short) for name, w in quantised.items()]
    return steps, verdicts


def _ours(w: Tensor | QuantizedWeight, a: Tensor, b: Tensor, scale: float) -> Task:
    return Task(lambda x: lora_linear(x, w, a, b, scale=scale), (a, b), ())


def _judge(M: int, name: str, w: QuantizedWeight, p: judge.Problem, short: str) -> dict[str, Any]:
    """Return the entry of one of our variants under "gate". `p` has the weight before it was quantised to `w`."""
    exact, plain = judge.over_codes(p, w)
    got = judge.evaluate(p, lambda x, _, a, b, **more: lora_linear(x, w, a, b, **more))
    verdicts = judge.judge(got, exact, judge.truth(exact), plain)
    return {"M": M, "name": f"{name} {short}", "faults": [v.fault for v in verdicts if v.fault]}


def _peer() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("peft", "bitsandbytes"))


def _peer_layer(w: Tensor, p: judge.Problem, training: bool) -> nn.Module:
    """Return PEFT's LoRA over Linear4bit, with the adapters of `p`, built as users build it."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from peft import LoraConfig, get_peft_model

    base = Linear4bit(w.shape[1], w.shape[0], bias=False, compute_dtype=p.x.dtype, quant_type="nf4")
    base.weight = Params4bit(w.to(p.x.dtype), requires_grad=False, quant_type="nf4")
    model: Any = nn.Sequential(base.to("cpu"))
    model.is_loaded_in_4bit = True  # the mark that transformers sets: PEFT then takes its class for bitsandbytes
    R = p.a.shape[0]
    peft = get_peft_model(model, LoraConfig(r=R, lora_alpha=R * p.scale, target_modules=["0"]))  # type: ignore[arg-type]
    assert type(peft.base_model.model[0]).__name__ == "Linear4bit"
    with torch.no_grad():
        for name, t in peft.named_parameters():
            if "lora_" in name:
                t.data = (p.a if "lora_A" in name else p.b).clone()
    return peft.train(training)


def _row(M: int, name: str, taken: timing.Rounds) -> Row:
    format, _, short = name.rpartition(" ")
    targets = {other: most for other, most in TARGETS.get((M, format, short), []) if other in taken.repeats}
    others = {"F.linear fp32", f"F.linear {short}", *targets, f"PEFT + bitsandbytes {short}"} & taken.repeats.keys()
    ratios = {other: timing.quartiles(taken.ratios(name, other)) for other in sorted(others) if other != name}
    return Row(M, name, timing.quartiles(taken.seconds(name)), ratios, targets)


def tables(document: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return a table (title, header, rows) for each M."""
    size = document["size"]
    found = []
    for M in dict.fromkeys(row["M"] for row in document["rows"]):
        what = "decoding: forward" if M == DECODE else "training: forward + backward"
        title = f"{what}, M = {M}, {size['K']}→{size['N']}, r{size['R']}"
        rows = []
        for row in (row for row in document["rows"] if row["M"] == M):
            ratios = [f"×{value[1]:.2f} of {other}" for other, value in row["ratios"].items()]
            rows.append([row["name"], f"{row['seconds'][1] * 1e3:.3g} ms", "; ".join(ratios), met_or_missed(row)])
        found.append((title, ["layer", "time", "ratio within a round", "target"], rows))
    return found


def met_or_missed(row: dict[str, Any]) -> str:
    """Return each target of a row with "met" or "missed"."""
    words = []
    for other, most in row["targets"].items():
        words.append(f"≤ {most:.2f} of {other} {report.met_or_missed(row['ratios'][other][1], most)}")
    return "; ".join(words)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Return 1 if the judge found a fault, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantised",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="default: 15")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON to write")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    show = terminal()
    document = measure((N, K, R), (DECODE, TRAINING), args.rounds, show)
    for table in tables(document):
        show.table(*table, words=True)
    for entry in document["memory"]:
        show.line(
            f"Peak memory of a first training step beyond weights, activations and gradients, {entry['name']}, "
            f"M = {entry['M']}: {entry['mb']:.1f} MB (at most {entry['most']:.0f})"
        )
    return close(document, args.out, show, lambda entry: f"{entry['name']}, M = {entry['M']}")


if __name__ == "__main__":
    raise SystemExit(main())
