"""Six initialisations of LoRA beside each other, each at its own best learning rate.

    python examples/initialisations.py [--short] [--out DIR]

1. Pretrain the small vision transformer of digits.py on upright digits.
2. Adapt it to rotated digits from the first values of each initialisation, at several learning rates, with the same
   batches in the same order and a constant rate.
3. Compare the training losses and the accuracies, in a table and a picture.

An initialisation changes how fast an adapter learns at a given learning rate, so a comparison at one rate says little.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _data import Digits, load_data, shift
from _report import STYLE
from _vit import ViT
from digits import BATCH, TARGETS, logits, train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from lora_kernels import adapter_parameters, apply_lora
from lora_kernels.train import lora_ga

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "milora", "lora_ga")
COLOURS = dict(zip(INITS, ("#000000", "#56B4E9", "#CC79A7", "#E69F00", "#009E73", "#D55E00"), strict=True))
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
RANK, ALPHA, GAMMA = 4, 8, 64.0
EARLY = 20
"""The step after which the loss is compared first."""


@dataclass(frozen=True)
class Lengths:
    pretrain_epochs: int = 12
    steps: int = 120


@dataclass
class Run:
    """One training, from one initialisation at one learning rate."""

    losses: list[float]
    accuracy: float

    @property
    def last(self) -> float:
        """The mean loss of the last tenth of the steps."""
        return mean(self.losses[-max(1, len(self.losses) // 10) :])

    @property
    def early(self) -> float:
        """The mean loss of five steps around step `EARLY`."""
        middle = min(EARLY, len(self.losses) - 1)
        return mean(self.losses[max(0, middle - 2) : middle + 3])


Results = dict[str, dict[float, Run]]


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def loss(model: ViT, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)


def batches(images: Tensor, labels: Tensor, n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    chosen = [torch.randint(len(images), (BATCH,)) for _ in range(n)]
    return [(shift(images[rows]), labels[rows]) for rows in chosen]


def start(pretrained: ViT, init: str, data: list[tuple[Tensor, Tensor]]) -> ViT:
    """Return a copy of the model with adapters that begin as `init` says."""
    model = copy.deepcopy(pretrained)
    how = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    if init == "lora_ga":
        lora_ga(model, data, loss, gamma=GAMMA, **how)
    else:
        apply_lora(model, init=init, **how)
    return model


def adapt(model: ViT, data: list[tuple[Tensor, Tensor]], rate: float) -> list[float]:
    """Train the adapters with one batch after another, and return the losses."""
    model.train()
    optimizer = torch.optim.AdamW(adapter_parameters(model), rate, weight_decay=0, fused=True)
    losses = []
    for batch in data:
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def compare(pretrained: ViT, training: Digits, test: Digits, lengths: Lengths) -> Results:
    data = batches(training.rotated, training.labels, lengths.steps, seed=1)
    gradients = batches(training.rotated, training.labels, 8, seed=2)
    results: Results = {}
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(INITS) * len(RATES))
        for init in INITS:
            torch.manual_seed(0)
            begun = start(pretrained, init, gradients)
            results[init] = {}
            for rate in RATES:
                progress.update(task, description=f"{init}, lr {rate:g}")
                model = copy.deepcopy(begun)
                losses = adapt(model, data, rate)
                right = (logits(model, test.rotated).argmax(1) == test.labels).float().mean().item()
                results[init][rate] = Run(losses, right)
                progress.advance(task)
    return results


def best(runs: dict[float, Run]) -> float:
    """Return the learning rate with the least loss at the end."""
    return min(runs, key=lambda rate: runs[rate].last if math.isfinite(runs[rate].last) else math.inf)


def print_table(results: Results) -> None:
    table = Table(f"rank {RANK}, rotated digits")
    for column in ("best\nlr", f"loss at\nstep {EARLY}", "loss at\nthe end", "test\naccuracy"):
        table.add_column(column, justify="right")
    for init, runs in results.items():
        run = runs[rate := best(runs)]
        table.add_row(init, f"{rate:g}", f"{run.early:.3f}", f"{run.last:.3f}", f"{run.accuracy:.1%}")
    Console().print(table)


def plot(results: Results, path: Path) -> Path:
    """Draw the losses of each initialisation at its best learning rate, beside accuracies over learning rates."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
        for init, runs in results.items():
            losses = torch.tensor(runs[best(runs)].losses)
            smooth = losses.unfold(0, min(5, len(losses)), 1).mean(1)
            left.plot(range(3, 3 + len(smooth)), smooth, color=COLOURS[init], label=f"{init}, lr {best(runs):g}")
            accuracy = [100 * run.accuracy for run in runs.values()]
            right.plot(list(runs), accuracy, "o-", color=COLOURS[init], markersize=5, label=init)
        left.set(xlabel="step", ylabel="training loss (mean of 5 steps)", title="at its best learning rate")
        left.legend(frameon=False)
        right.set(xscale="log", xlabel="learning rate", ylabel="accuracy on rotated test digits, %")
        right.set_title("at every learning rate")
        right.set_xticks(list(RATES), [f"{rate:g}" for rate in RATES])
        right.minorticks_off()
        figure.suptitle("First values of a LoRA adapter", fontsize=13, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def run(out: Path, lengths: Lengths) -> Results:
    training, test = load_data()
    torch.manual_seed(0)
    model = ViT()
    train(model, training.images, training.labels, test, lengths.pretrain_epochs, 5e-3, "pretrain")
    results = compare(model, training, test, lengths)
    print_table(results)
    print("picture:", plot(results, out / "initialisations.png"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run everything with fewer steps")
    default = Path(__file__).parent.parent / "build" / "examples"
    parser.add_argument("--out", type=Path, default=default, help="folder for the picture")
    arguments = parser.parse_args()
    run(arguments.out, Lengths(4, 15) if arguments.short else Lengths())


if __name__ == "__main__":
    main()
