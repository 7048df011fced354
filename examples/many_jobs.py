"""Eight fine-tunings at once on one frozen model, against the same eight one after another.

    python examples/many_jobs.py [--short] [--out DIR]

1. Pretrain the small vision transformer of digits.py on upright digits.
2. Adapt it to rotated digits eight times, with four learning rates and two ranks: all eight jobs in the same steps,
   and beside that each job alone, on a copy of the model.
3. Compare losses, accuracies and time.

Every job has its own batches of eight images, its own optimiser and its own dropout. A sweep of such small jobs is
where training together pays: the layers are called once for all of them.

The base's products may be rounded otherwise for another number of rows. Where a learning rate is so high that training
is unstable, such a difference grows, and a job then ends elsewhere than it does alone.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _data import Digits, load_data
from _report import LOSS, ROTATED, STYLE, UPRIGHT
from _vit import ViT
from digits import TARGETS, logits, train
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

from lora_kernels.jobs import Job, Jobs, LoRAConfig

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
RANKS = (2, 16)
DROPOUT = 0.05
BATCH = 8


@dataclass(frozen=True)
class Lengths:
    pretrain_epochs: int = 12
    steps: int = 400


@dataclass
class Run:
    """What came out of one job, together with the others or alone."""

    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0


@dataclass
class Results:
    together: dict[str, Run]
    alone: dict[str, Run]
    seconds_together: float
    seconds_alone: dict[str, float]


def name_of(rank: int, rate: float) -> str:
    return f"rank {rank}, lr {rate:g}"


def sweep(images: Tensor, labels: Tensor, steps: int) -> list[Job]:
    """Return a job for each rank and learning rate. That is all it takes to describe them."""
    data = TensorDataset(images, labels)
    return [
        Job(
            name_of(rank, rate),
            data,
            loss,
            LoRAConfig(r=rank, lora_alpha=2 * rank, lora_dropout=DROPOUT, target_modules=TARGETS),
            batch_size=BATCH,
            optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.05, fused=True),
            schedule=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=rate, total_steps=steps + 1, pct_start=0.25),
            max_grad_norm=1.0,
            steps=steps,
            seed=number,
        )
        for number, (rank, rate) in enumerate((rank, rate) for rank in RANKS for rate in RATES)
    ]


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1], label_smoothing=0.1)


class Trained:
    """A Jobs on a copy of the model, with the losses of its jobs and the seconds of its steps."""

    def __init__(self, model: ViT, jobs: list[Job]) -> None:
        self.model = copy.deepcopy(model)
        self.jobs = Jobs(self.model, jobs)
        self.runs = {job.name: Run() for job in jobs}
        self.seconds = 0.0

    def step(self) -> None:
        start = time.perf_counter()
        progress = self.jobs.step()
        self.seconds += time.perf_counter() - start
        for name, now in progress.items():
            assert now.loss is not None
            self.runs[name].losses.append(now.loss)

    def finish(self, test: Digits) -> None:
        """Note the accuracy of each job, and make the model plain again."""
        for name, run in self.runs.items():
            with self.jobs.using(name):
                run.accuracy = (logits(self.model, test.rotated).argmax(1) == test.labels).float().mean().item()
        self.jobs.close()


def compare(model: ViT, jobs: list[Job], test: Digits) -> Results:
    """Train the jobs together and each alone. They take turns, so that other load slows all of them alike."""
    together, alone = Trained(model, jobs), {job.name: Trained(model, [job]) for job in jobs}
    for _ in tqdm(range(jobs[0].steps or 0), desc="together, and each alone", unit="step"):
        for each in (together, *alone.values()):
            each.step()
    for each in (together, *alone.values()):
        each.finish(test)
    runs = {name: each.runs[name] for name, each in alone.items()}
    return Results(together.runs, runs, together.seconds, {name: each.seconds for name, each in alone.items()})


def print_table(results: Results) -> None:
    table = Table("job")
    for column in ("accuracy\ntogether", "\nalone", "last loss\ntogether", "\nalone", "seconds\nalone"):
        table.add_column(column, justify="right")
    for name, one in results.together.items():
        other = results.alone[name]
        table.add_row(
            name,
            f"{one.accuracy:.1%}",
            f"{other.accuracy:.1%}",
            f"{one.losses[-1]:.4f}",
            f"{other.losses[-1]:.4f}",
            f"{results.seconds_alone[name]:.1f}",
        )
    console = Console()
    console.print(table)
    pairs = [zip(one.losses[:10], results.alone[name].losses, strict=False) for name, one in results.together.items()]
    apart = max(abs(mine - other) for pair in pairs for mine, other in pair)
    total = sum(results.seconds_alone.values())
    console.print(
        f"all jobs together: {results.seconds_together:.1f} s, one after another: {total:.1f} s "
        f"({total / results.seconds_together:.2f} times as long)",
        f"the largest difference of a loss in the first ten steps: {apart:.1g}",
        sep="\n",
        highlight=False,
    )


def plot(results: Results, path: Path) -> Path:
    """Draw accuracies over learning rates beside the times."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(3, 2))
        for rank, colour in zip(RANKS, (UPRIGHT, ROTATED), strict=True):
            names = [name_of(rank, rate) for rate in RATES]
            accuracy = [100 * results.together[name].accuracy for name in names]
            left.plot(RATES, accuracy, "o-", color=colour, markersize=6, label=f"rank {rank}, together")
            accuracy = [100 * results.alone[name].accuracy for name in names]
            left.plot(RATES, accuracy, "x", color="black", markersize=8, label="alone" if rank == RANKS[-1] else None)
        left.set(xscale="log", xlabel="learning rate", ylabel="accuracy on rotated test digits, %")
        left.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        left.minorticks_off()
        left.legend(frameon=False)
        first = 0.0
        for i, (name, seconds) in enumerate(results.seconds_alone.items()):
            right.barh("one after\nanother", seconds, left=first, color=LOSS, alpha=0.9 if i % 2 else 0.6, label=name)
            first += seconds
        right.barh("together", results.seconds_together, color=UPRIGHT)
        for y, seconds in enumerate((first, results.seconds_together)):
            right.text(seconds, y, f" {seconds:.1f} s", va="center")
        right.set(xlabel="seconds of training, all jobs", xlim=(0, 1.25 * max(first, results.seconds_together)))
        right.grid(axis="y", visible=False)
        figure.suptitle("Eight fine-tunings on one frozen model", fontsize=13, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def run(out: Path, lengths: Lengths) -> Results:
    training, test = load_data()
    torch.manual_seed(0)
    model = ViT()
    train(model, training.images, training.labels, test, lengths.pretrain_epochs, 5e-3, "pretrain")
    model.eval()  # of the base; the dropout of the adapters is on in every step
    results = compare(model, sweep(training.rotated, training.labels, lengths.steps), test)
    print_table(results)
    print("picture:", plot(results, out / "many_jobs.png"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run everything with fewer steps")
    default = Path(__file__).parent.parent / "build" / "examples"
    parser.add_argument("--out", type=Path, default=default, help="folder for the picture")
    arguments = parser.parse_args()
    run(arguments.out, Lengths(pretrain_epochs=4, steps=40) if arguments.short else Lengths())


if __name__ == "__main__":
    main()
