"""LoRA, LoRA+, LoRA-FA and ResLoRA beside each other, each at its own best learning rate.

    python examples/training_methods.py [--short] [--out DIR]

1. Pretrain the small vision transformer of digits.py on upright digits.
2. Adapt copies of it to digits rotated by 90 degrees with each method at several learning rates, and choose the rate
   with the least loss on training images that were held out.
3. Adapt copies again from other seeds at that rate. The methods take turns step by step, so that all see the same
   batches and other load slows all alike.
4. Compare accuracy, the parameters that are trained, what a forward keeps for its backward, and the time of a step.

One rule for all: the same steps, batches and first values of A, AdamW with a rate that falls to zero, rank 4 and s = 2.
ResLoRA's block shortcuts make the update of a layer one of rank 8, so LoRA of rank 8 stands beside it. Input and middle
shortcuts become plain LoRA, for use, by an approximation: the accuracy after that is told too.
"""

from __future__ import annotations

import argparse
import copy
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

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RANK, S, RATIO = 4, 2, 16
BATCH, HELD_OUT = 32, 288
Models = dict[str, ViT]
Bar = Callable[[Iterator[Models], str], Iterator[Models]]
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
    steps: int = 120
    every: int = 20
    """The number of steps between two measurements of the test accuracy."""
    seeds: int = 3
    """The number of trainings that are compared, after those that choose the learning rate."""
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
class Results:
    """What came out of each method."""

    lengths: Lengths
    losses: dict[str, dict[float, float]] = field(default_factory=dict)  # on the held-out images, by learning rate
    accuracies: dict[str, list[list[float]]] = field(default_factory=dict)  # of each seed, each `every` steps
    as_lora: dict[str, list[float]] = field(default_factory=dict)  # where that is an approximation
    parameters: dict[str, int] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)  # bytes
    step_times: dict[str, list[float]] = field(default_factory=dict)  # seconds

    def rate(self, name: str) -> float:
        """Return the learning rate with the least loss on the held-out images."""
        losses = self.losses[name]
        return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)

    def last(self, name: str) -> list[float]:
        """Return the accuracies at the end, of each seed."""
        return [accuracies[-1] for accuracies in self.accuracies[name]]

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


def adapt(task: Task, rates: dict[str, float], seed: int, results: Results) -> Iterator[Models]:
    """Train a model by each method, on the same batches in turns. Yield the models before the first step and after
    each, and add the times of the steps to the results."""
    steps = results.lengths.steps
    models = {name: adapted(task.pretrained, name, seed) for name in METHODS}
    optimizers = {
        name: torch.optim.AdamW(METHODS[name].groups(model, rates[name]), rates[name], weight_decay=0, fused=True)
        for name, model in models.items()
    }
    schedules = {name: torch.optim.lr_scheduler.LinearLR(optimizers[name], 1.0, 0.0, steps) for name in METHODS}
    yield models
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
        results.losses[name], results.accuracies[name], results.step_times[name] = {}, [], []


def choose_rates(task: Task, results: Results, bar: Bar) -> None:
    """Add the loss of each method on the held-out images, at each learning rate."""
    for rate in results.lengths.rates:
        *_, models = bar(adapt(task, dict.fromkeys(METHODS, rate), 0, results), f"{len(METHODS)} methods, lr {rate:g}")
        for name, model in models.items():
            results.losses[name][rate] = loss_on(model, task.held_out)


def compare(task: Task, results: Results, bar: Bar) -> None:
    """Add the accuracies of each method at its best learning rate."""
    rates, lengths = {name: results.rate(name) for name in METHODS}, results.lengths
    for seed in range(1, lengths.seeds + 1):
        training = bar(adapt(task, rates, seed, results), f"{len(METHODS)} methods, each at its best lr, seed {seed}")
        for name in METHODS:
            results.accuracies[name].append([])
        for i, models in enumerate(training):
            for name, model in models.items() if i % lengths.every == 0 else ():
                results.accuracies[name][-1].append(accuracy(model, task.test))
        for name, model in models.items():
            if METHODS[name].approximate:
                reslora_to_lora(model, task.training.rotated[:HELD_OUT])
                results.as_lora.setdefault(name, []).append(accuracy(model, task.test))


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
        trainings = len(lengths.rates) + lengths.seeds
        shown = progress.add_task("", total=trainings * (lengths.steps + 1))

        def bar(training: Iterator[Models], text: str) -> Iterator[Models]:
            progress.update(shown, description=text)
            for models in training:
                yield models
                progress.advance(shown)

        choose_rates(task, results, bar)
        compare(task, results, bar)
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
