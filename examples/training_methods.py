"""LoRA, LoRA+, LoRA-FA and ResLoRA beside each other, each at its own best learning rate.

    python examples/training_methods.py [--short] [--out DIR]

1. Pretrain the small vision transformer of digits.py on upright digits.
2. Adapt copies of it to digits rotated by 90 degrees with each method, at several learning rates and from several
   seeds. The methods take turns step by step, so that all see the same batches and other load slows all alike.
3. Take each method at the rate with the least loss on training images that were held out, for all seeds together.
4. Compare accuracy, the parameters that are trained, what a forward keeps for its backward, and the time of a step.

One rule for all: the same steps, batches and first values of A, AdamW with the one-cycle rate of digits.py, rank 4 and
s = 2. ResLoRA's block shortcuts make the update of a layer one of rank 8, so LoRA of rank 8 stands beside it. Input and
middle shortcuts become plain LoRA, for use, by an approximation: the accuracy after that is told too.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from _data import Digits, load_data
from _methods import plot, print_table
from _vit import ViT
from digits import TARGETS, logits, train
from initialisations import batches, loss
from resnet import saved_bytes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from lora_kernels import adapter_parameters, apply_lora, apply_reslora, reslora_to_lora, trainable_parameters
from lora_kernels.train import freeze_a, loraplus_groups

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
RANK, S, RATIO = 4, 2, 16
BATCH, HELD_OUT = 32, 288
Models = dict[str, ViT]
Groups = Callable[[nn.Module, float], Iterable[Any]]


def lora(model: nn.Module, r: int = RANK) -> None:
    apply_lora(model, r=r, lora_alpha=S * r, target_modules=TARGETS)


def lora_fa(model: nn.Module, project: bool) -> None:
    lora(model)
    freeze_a(model, project=project)


def reslora(model: nn.Module, structure: Literal["bs", "is", "ms"]) -> None:
    apply_reslora(model, structure, r=RANK, lora_alpha=S * RANK, target_modules=TARGETS)


def one_rate(model: nn.Module, rate: float) -> Iterable[Any]:
    return adapter_parameters(model)


@dataclass(frozen=True)
class Method:
    """What puts the adapters into a model, what the optimiser gets, and whether plain LoRA only approximates it."""

    put: Callable[[nn.Module], None]
    groups: Groups = one_rate
    approximate: bool = False


LORA = "LoRA"
METHODS = {
    LORA: Method(lora),
    "LoRA, rank 8": Method(partial(lora, r=2 * RANK)),
    "LoRA+": Method(lora, partial(loraplus_groups, ratio=RATIO)),
    "LoRA-FA": Method(partial(lora_fa, project=True)),
    "LoRA-FA, unprojected": Method(partial(lora_fa, project=False)),
    "ResLoRA, block": Method(partial(reslora, structure="bs")),
    "ResLoRA, input": Method(partial(reslora, structure="is"), approximate=True),
    "ResLoRA, middle": Method(partial(reslora, structure="ms"), approximate=True),
}


@dataclass(frozen=True)
class Lengths:
    pretrain_epochs: int = 12
    steps: int = 90
    every: int = 15
    """The number of steps between two measurements of the test accuracy."""
    seeds: int = 3
    rates: tuple[float, ...] = RATES


SHORT = Lengths(pretrain_epochs=3, steps=12, every=3, seeds=2, rates=(3e-3, 1e-2))


@dataclass
class Task:
    """What every method adapts, and to what."""

    pretrained: ViT
    training: Digits
    held_out: Digits
    test: Digits


@dataclass
class Run:
    """One training, by one method at one learning rate from one seed."""

    accuracies: list[float] = field(default_factory=list)  # on the rotated test images, each `every` steps
    held_out: float = math.inf  # the loss on the held-out images
    as_lora: float | None = None  # the accuracy as plain LoRA, where that is an approximation


@dataclass
class Results:
    """What came out of each method."""

    lengths: Lengths
    runs: dict[str, dict[float, list[Run]]] = field(default_factory=dict)  # one for each seed
    parameters: dict[str, int] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)  # bytes
    step_times: dict[str, list[float]] = field(default_factory=dict)  # seconds

    def rate(self, name: str) -> float:
        """Return the learning rate with the least loss on the held-out images, in the mean of the seeds."""
        losses = {rate: statistics.fmean(run.held_out for run in runs) for rate, runs in self.runs[name].items()}
        return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)

    def best(self, name: str) -> list[Run]:
        return self.runs[name][self.rate(name)]

    def ratio(self, name: str) -> float:
        """Return the time of a step over that of LoRA, the median over the steps that were made one after the other."""
        pairs = zip(self.step_times[name], self.step_times[LORA], strict=True)
        return statistics.median(own / lora for own, lora in pairs)


def accuracy(model: nn.Module, test: Digits) -> float:
    return (logits(model, test.rotated).argmax(1) == test.labels).float().mean().item()


@torch.no_grad()
def loss_on(model: ViT, digits: Digits) -> float:
    return loss(model.eval(), (digits.rotated, digits.labels)).item()


def adapted(pretrained: ViT, name: str, seed: int) -> ViT:
    """Return a copy of the model with the adapters of a method."""
    model = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    METHODS[name].put(model)
    return model


def adapt(task: Task, rate: float, seed: int, results: Results) -> Iterator[Models]:
    """Train a model by each method, on the same batches in turns. Yield the models after each step, and add the times
    of the steps to the results."""
    steps = results.lengths.steps
    models = {name: adapted(task.pretrained, name, seed) for name in METHODS}
    optimizers, schedules = {}, {}
    for name, model in models.items():
        optimizers[name] = torch.optim.AdamW(METHODS[name].groups(model, rate), rate, weight_decay=0, fused=True)
        highest = [group["lr"] for group in optimizers[name].param_groups]
        schedules[name] = torch.optim.lr_scheduler.OneCycleLR(
            optimizers[name], highest, total_steps=steps + 1, pct_start=0.25
        )
    for images, labels in batches(task.training.rotated, task.training.labels, steps, seed):
        batch = images[:BATCH], labels[:BATCH]
        for name, model in models.items():
            model.train()
            start = time.perf_counter()
            loss(model, batch).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            results.step_times[name].append(time.perf_counter() - start)
            schedules[name].step()
        yield models


def measure(task: Task, results: Results) -> None:
    """Add what tells the methods apart before a training."""
    batch = task.training.rotated[:BATCH], task.training.labels[:BATCH]
    for name in METHODS:
        model = adapted(task.pretrained, name, 0)
        results.parameters[name] = trainable_parameters(model).trainable
        results.saved[name] = saved_bytes(model, *batch)
        results.runs[name], results.step_times[name] = {rate: [] for rate in results.lengths.rates}, []


def compare(task: Task, results: Results, rate: float, seed: int, advance: Callable[[], None]) -> None:
    """Add one training by each method."""
    runs = {name: Run() for name in METHODS}
    models: Models = {}
    for i, models in enumerate(adapt(task, rate, seed, results), 1):
        for name, model in models.items() if i % results.lengths.every == 0 else ():
            runs[name].accuracies.append(accuracy(model, task.test))
        advance()
    for name, model in models.items():
        runs[name].held_out = loss_on(model, task.held_out)
        if METHODS[name].approximate:
            reslora_to_lora(model, task.training.rotated[:HELD_OUT])
            runs[name].as_lora = accuracy(model, task.test)
        results.runs[name][rate].append(runs[name])


def run(out: Path, lengths: Lengths) -> Results:
    training, test = load_data()
    images, labels = training.images, training.labels
    training, held_out = Digits(images[HELD_OUT:], labels[HELD_OUT:]), Digits(images[:HELD_OUT], labels[:HELD_OUT])
    torch.manual_seed(0)
    task, results = Task(ViT(), training, held_out, test), Results(lengths)
    train(task.pretrained, training.images, training.labels, test, lengths.pretrain_epochs, 5e-3, "pretrain")
    measure(task, results)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        trainings = list(itertools.product(range(lengths.seeds), lengths.rates))
        shown = progress.add_task("", total=len(trainings) * lengths.steps)
        for seed, rate in trainings:
            progress.update(shown, description=f"{len(METHODS)} methods, seed {seed}, lr {rate:g}")
            compare(task, results, rate, seed, partial(progress.advance, shown))
    print_table(results)
    print("picture:", plot(results, out / "training_methods.png"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run everything with fewer steps, rates and seeds")
    default = Path(__file__).parent.parent / "build" / "examples"
    parser.add_argument("--out", type=Path, default=default, help="folder for the picture")
    arguments = parser.parse_args()
    run(arguments.out, SHORT if arguments.short else Lengths())


if __name__ == "__main__":
    main()
