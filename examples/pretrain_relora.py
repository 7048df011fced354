"""Pretrain a small language model in full, with LoRA, with ReLoRA, and with ReLoRA without each of its three parts.

    python examples/pretrain_relora.py [--short] [--seeds N] [--grid] [--out DIR] [--record]

1. Take the documentation strings of Python's standard library, byte by byte.
2. Warm up: train all weights of a Llama of two layers for a few steps.
3. Go on from there in six ways, on the same batches. The ways take turns, so that other load slows all alike.
4. Compare the perplexity of held-out text, and how many directions the weights have moved in.

ReLoRA (Lialin and others, 2023, arXiv:2307.05695) is LoRA that is added to its weights again and again. Its parts are
the restart (W ← W + s·B A, then a new A and B), pruning the optimiser's moments at a restart, and warming the learning
rate up again after it. In every way the embeddings, the norms and the head are trained in full.

The learning rate of each way is the best of 0.0025, 0.005, 0.01, ... on a seed and on held-out text that the table does
not use. ``--grid`` shows it: it trains each way at its rate, at half of it and at twice of it.

``--record`` writes the results to benchmarks/results/relora. scripts/update_readme.py takes them to docs/relora.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _pretrain import Data, above, linear_weights, load_data, make_model, perplexity, spectra
from _pretrain_report import SHOWN, plot, print_table, summary
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils import logging

from lora_kernels import apply_lora, trainable_parameters
from lora_kernels.analysis import effective_rank
from lora_kernels.testing import documents, machine
from lora_kernels.train import jagged_cosine, restart

ROOT = Path(__file__).parent.parent
RANK = 2
BATCH = 16
FULL, LORA, RELORA = "full rank", "LoRA", "ReLoRA"
WARM_RATE = 4e-3  # at twice of it a warm start of 100 steps came to a perplexity of 16.4, not of 13.5
GRID_SEED = 0  # the table has seeds 1, 2, ...


@dataclass(frozen=True)
class Method:
    """A way to train on after the warm start."""

    rate: float
    """The learning rate after its warm-up."""
    low_rank: bool = True
    restarts: bool = True
    prune: float = 0.99
    """The fraction of the optimiser's moments that a restart makes zero."""
    rewarm: bool = True
    """Whether the learning rate falls to zero and warms up again where restarts are due."""


METHODS = {
    FULL: Method(8e-3, low_rank=False, restarts=False, rewarm=False),
    LORA: Method(2e-2, restarts=False, rewarm=False),
    "ReLoRA, no restarts": Method(2e-2, restarts=False),
    "ReLoRA, no pruning": Method(2e-2, prune=0.0),
    "ReLoRA, no re-warming": Method(4e-2, rewarm=False),
    RELORA: Method(2e-2),
}


@dataclass(frozen=True)
class Lengths:
    """Numbers of steps, and of held-out sequences."""

    warm_start: int = 100
    steps: int = 1600
    every: int = 160
    """The steps between two restarts."""
    warmup: int = 10
    """The steps of a warm-up, of the first one and of those after restarts."""
    measure: int = 40
    """The steps between two points of a curve."""
    rows: int = 1024
    """The sequences in each part of the held-out text; a point of a curve takes the first 128."""


SHORT = Lengths(warm_start=20, steps=40, every=20, warmup=4, measure=10, rows=64)


def batches(rows: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield batches without end, in an order of their own in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        yield from (rows[part] for part in order.split(BATCH) if len(part) == BATCH)


class Training:
    """A model that is trained in one way, and what is noted of it."""

    def __init__(self, start: LlamaForCausalLM, method: Method, lengths: Lengths, seed: int) -> None:
        self.model, self.method, self.lengths = copy.deepcopy(start), method, lengths
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        if method.low_rank:
            apply_lora(self.model, r=RANK, lora_alpha=RANK, target_modules=r".*_proj")
            for part in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
                part.requires_grad_(True)
            for name, p in self.model.named_parameters():
                if "norm" in name:
                    p.requires_grad_(True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=method.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        rewarm = lengths.warmup if method.rewarm else 0
        factor = jagged_cosine(lengths.steps, lengths.every, warmup=lengths.warmup, restart_warmup=rewarm)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.done = 0
        self.seconds: list[float] = []
        self.restart_seconds: list[float] = []
        self.curve: list[float] = []

    def step(self, batch: Tensor) -> None:
        if self.method.restarts and self.done and self.done % self.lengths.every == 0:
            start = time.perf_counter()
            restart(self.model, self.optimizer, prune=self.method.prune, generator=self.generator)
            self.restart_seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        self.model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.seconds.append(time.perf_counter() - start)
        self.done += 1

    def measure(self, rows: Tensor) -> None:
        self.curve.append(perplexity(self.model, rows[:128]))


def warm_start(data: Data, lengths: Lengths, seed: int) -> LlamaForCausalLM:
    """Return a model that has been trained in full for a few steps."""
    # One cycle that is never finished: after its warm-up, the rate hardly falls.
    far = 100 * lengths.warm_start
    gentle = replace(lengths, steps=far, every=far, warmup=lengths.warm_start // 5)
    training = Training(make_model(seed), replace(METHODS[FULL], rate=WARM_RATE), gentle, seed)
    for _, batch in zip(range(lengths.warm_start), batches(data.train, seed), strict=False):
        training.step(batch)
    return training.model


def train(
    start: LlamaForCausalLM, methods: dict[str, Method], data: Data, lengths: Lengths, seed: int, title: str
) -> dict[str, Training]:
    """Train copies of a model in each of the ways, in turns, on the same batches."""
    trainings = {name: Training(start, method, lengths, seed) for name, method in methods.items()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        # Other batches than those of the warm start.
        stream = batches(data.train, 1000 + seed)
        for done in progress.track(range(lengths.steps + 1), description=title):
            if done % lengths.measure == 0:
                for training in trainings.values():
                    training.measure(data.choose)
            if done < lengths.steps:
                batch = next(stream)
                for training in trainings.values():
                    training.step(batch)
    return trainings


def entry(name: str, training: Training, start: LlamaForCausalLM, data: Data, seed: int) -> dict[str, Any]:
    """Return what a training has come to, for the document."""
    values = spectra(linear_weights(start), linear_weights(training.model))
    return {
        "method": name,
        "seed": seed,
        **asdict(training.method),
        "trained": trainable_parameters(training.model).trainable,
        "perplexity": perplexity(training.model, data.test),
        "curve": training.curve,
        "seconds": statistics.quantiles(training.seconds, n=4, method="inclusive"),
        "restart_seconds": statistics.median(training.restart_seconds) if training.restart_seconds else None,
        "effective_rank": statistics.fmean(effective_rank(each) for each in values.values()),
        "above": statistics.fmean(above(each) for each in values.values()),
        "spectrum": [float(f"{value:.4g}") for value in values[SHOWN].tolist()],
    }


def compare(lengths: Lengths, seeds: int) -> dict[str, Any]:
    """Return a document with an entry for each way and seed."""
    data = load_data(lengths.rows)
    document = documents.begin(torch.device("cpu"), ("torch", "transformers")) | {
        "settings": asdict(lengths) | {"rank": RANK, "batch": BATCH, "length": data.train.shape[1]},
        "parameters": make_model(0).num_parameters(),
        "starts": [],
        "runs": [],
    }
    for seed in range(1, seeds + 1):
        start = warm_start(data, lengths, seed)
        document["starts"].append({"seed": seed, "perplexity": perplexity(start, data.test)})
        trainings = train(start, METHODS, data, lengths, seed, f"seed {seed} of {seeds}")
        document["runs"] += [entry(name, each, start, data, seed) for name, each in trainings.items()]
    return document | {"rows": summary(document["runs"])}


def grid(lengths: Lengths, methods: dict[str, Method]) -> None:
    """Print the perplexity of the text for choosing, by way and learning rate."""
    data = load_data(lengths.rows)
    start = warm_start(data, lengths, GRID_SEED)
    for name, method in methods.items():
        rates = [method.rate * factor for factor in (0.5, 1, 2)]
        found = train(start, {str(r): replace(method, rate=r) for r in rates}, data, lengths, GRID_SEED, f"{name:22}")
        told = "  ".join(
            f"lr {float(rate):g}: {perplexity(each.model, data.choose):.3f}" for rate, each in found.items()
        )
        Console().print(f"{name:22} {told}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run everything in a few steps")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each way, 1 by default")
    parser.add_argument("--grid", action="store_true", help="only try the learning rates")
    parser.add_argument("--record", action="store_true", help="write the results to benchmarks/results/relora")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "examples", help="folder for the picture")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {arguments.seeds}")
    logging.set_verbosity_error()
    lengths = SHORT if arguments.short else Lengths()
    if arguments.grid:
        return grid(lengths, METHODS)
    document = compare(lengths, arguments.seeds)
    print_table(document)
    picture = arguments.out / "pretrain_relora.png"
    if arguments.record:
        name = f"{document['date'][:10]}-{machine.kind(document['device'])}"
        picture = ROOT / "benchmarks" / "results" / "relora" / f"{name}.png"
        documents.write(document, picture.with_suffix(".json"))
        print("results:", picture.with_suffix(".json"))
    print("picture:", plot(document, picture))


if __name__ == "__main__":
    main()
