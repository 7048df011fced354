"""Adapters of a second stream that may be missing (FLoRA), on real data with no download: scikit-learn's digits.

    python examples/missing_modality.py [--short] [--out DIR]

1. Pretrain the small vision transformer of digits.py on the upper quarter of each digit. The rest is blank.
2. Let the rest of the digit come as a second stream. LoRA adapters serve its tokens, and in a second experiment further
   adapters, trained with them, serve the tokens of the upper quarter.
3. Train both with p = 0, 0.3 and 0.5. `adapter_dropout` draws the samples that lose their second stream in a step, and
   `mixed` computes that stream's tokens without their adapters.
4. Test with the second stream in none, half and all of the samples, and check that a sample without it has the bits of
   the pretrained model.

Where only the adapters of the second stream are trained, a sample without it is the pretrained model's, whatever p was:
a p above 0 then only costs. Where anything is trained beside them, it comes to rely on the second stream, and p helps.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _data import BACKGROUND, SPREAD, Digits, load_data, shift
from _report import LOSS, STYLE
from _sweep import LOOKS, words
from _vit import TOKENS, ViT
from digits import BATCH
from matplotlib.axes import Axes
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from lora_kernels import fuse, mixed
from lora_kernels.train import adapter_dropout

BLANK = -BACKGROUND / SPREAD
OF_REST = torch.arange(TOKENS) >= TOKENS // 4  # the tokens of the second stream: all but the first row of patches
REST, UPPER, BASE = 0, 1, -1  # the adapters of the two streams by their numbers in the model, and no adapter
ALONE, BOTH = "second stream", "both streams"
"""Whose adapters are trained."""
TARGETS = ["embed", "q", "k", "v", "proj", "fc1", "fc2"]
RANK, ALPHA, RATE = 8, 16, 1e-2
CHECKS = {
    ALONE: "without its second stream, a sample has the bits of the pretrained model",
    BOTH: "so it has beside adapters of both streams, if both are off for it",
}
PS = (0.0, 0.3, 0.5)
SHARES = (0.0, 0.5, 1.0)
"""The shares of the test samples that come with their second stream."""
COLUMNS = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()


@dataclass(frozen=True)
class Lengths:
    pretrain_steps: int = 250
    steps: int = 150
    seeds: int = 3


@dataclass
class Results:
    base: float = 0.0
    """The accuracy of the pretrained model, which knows the first stream alone."""
    accuracy: dict[tuple[str, float, float], list[float]] = field(default_factory=dict)
    """By what is trained, p and the share of samples with their second stream: one for each seed."""
    left_on: dict[tuple[str, float], list[float]] = field(default_factory=dict)
    """The same at share 0, if the adapters of the missing stream are not switched off."""
    checks: dict[str, bool] = field(default_factory=dict)


def numbers(present: Tensor, upper: int) -> Tensor:
    """Return the adapter of each token, [B, TOKENS]: REST for the second stream where it is present, else BASE; and
    `upper` for the first stream."""
    return torch.where(OF_REST, torch.where(present, REST, BASE)[:, None], upper)


def seen(images: Tensor, present: Tensor) -> Tensor:
    """Return images [B, 8, 8] which are blank below the upper quarter where the second stream is not `present` [B]."""
    upper = images[:, :2]
    return torch.cat([upper, images[:, 2:].where(present[:, None, None], torch.tensor(BLANK))], 1)


def with_adapters(pretrained: ViT, names: list[str]) -> nn.Module:
    """Return a copy of the model with adapters of these names on every linear layer but the head."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    model = get_peft_model(copy.deepcopy(pretrained), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(names)  # all of them are trained
    fuse(model, strict=True)
    return model


def train(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    data: Digits,
    steps: int,
    rate: float,
    advance: Callable[[], None],
) -> None:
    """Train the parameters that require a gradient, by AdamW with a one-cycle learning rate. `advance` is called after
    each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.25)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(data.images), (BATCH,))
        F.cross_entropy(forward(shift(data.images[batch])), data.labels[batch], label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        advance()
    model.eval()


def training_forward(model: nn.Module, p: float, upper: int) -> Callable[[Tensor], Tensor]:
    """Return the forward of a training step, in which samples lose their second stream with probability p."""

    def forward(images: Tensor) -> Tensor:
        whole = numbers(torch.ones(len(images), dtype=torch.bool), upper)
        kept = adapter_dropout(whole, {REST: p})  # the first stream is never dropped
        with mixed(model, kept):  # the stream goes with its adapters
            return model(seen(images, (kept == REST).any(1)))

    return forward


@torch.no_grad()
def measure(model: nn.Module, pretrained: ViT, trained: str, p: float, seed: int, test: Digits, to: Results) -> None:
    """Add the accuracies of a trained model to the results, and check the bits of samples without that stream."""
    upper = UPPER if trained == BOTH else BASE
    n = len(test.images)
    place = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for share in SHARES:
        present = place < share * n
        images, ids = seen(test.images, present), numbers(present, upper)
        with mixed(model, ids):
            to.accuracy.setdefault((trained, p, share), []).append(accuracy(model(images), test))
        with mixed(model, torch.where(present[:, None], ids, BASE)):  # the first stream's adapters are off there, too
            same = torch.equal(model(images)[~present], pretrained(images)[~present])
        to.checks[CHECKS[trained]] = same and to.checks.get(CHECKS[trained], True)
    none = torch.zeros(n, dtype=torch.bool)
    with mixed(model, numbers(~none, upper)):
        to.left_on.setdefault((trained, p), []).append(accuracy(model(seen(test.images, none)), test))


def accuracy(logits: Tensor, test: Digits) -> float:
    return (logits.argmax(1) == test.labels).float().mean().item()


def compare(lengths: Lengths) -> Results:
    """Pretrain the model, train adapters on it in each way with each seed, and test them."""
    training, test = load_data()
    torch.manual_seed(0)
    pretrained, results = ViT(), Results()
    trainings = [
        (trained, p, seed) for trained, p in itertools.product((ALONE, BOTH), PS) for seed in range(lengths.seeds)
    ]
    with Progress(*COLUMNS, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("pretrain", total=lengths.pretrain_steps + len(trainings) * lengths.steps)
        advance = partial(progress.advance, task)

        def first_stream(images: Tensor) -> Tensor:
            return pretrained(seen(images, torch.zeros(len(images), dtype=torch.bool)))

        train(pretrained, first_stream, training, lengths.pretrain_steps, 3e-3, advance)
        with torch.no_grad():
            results.base = accuracy(first_stream(test.images), test)
        for trained, p, seed in trainings:
            progress.update(task, description=f"{trained}, p = {p:g}, seed {seed}")
            torch.manual_seed(seed)
            model = with_adapters(pretrained, ["rest", "upper"] if trained == BOTH else ["rest"])
            forward = training_forward(model, p, UPPER if trained == BOTH else BASE)
            train(model, forward, training, lengths.steps, RATE, advance)
            measure(model, pretrained, trained, p, seed, test, results)
    return results


def print_tables(results: Results) -> None:
    console = Console()
    table = Table("adapters of", "p", title="Accuracy on 360 test digits, %, by the share with a second stream")
    for share in SHARES:
        table.add_column(f"{share:.0%}", justify="right")
    table.add_column("0%, adapters\nleft on", justify="right")
    table.add_row("none: pretrained", "", f"{100 * results.base:.1f}", end_section=True)
    for (trained, p), left_on in results.left_on.items():
        accuracies = [words(results.accuracy[trained, p, share]) for share in SHARES]
        table.add_row(trained, f"{p:g}", *accuracies, words(left_on), end_section=p == PS[-1])
    console.print(table)
    for what, held in results.checks.items():
        console.print(f"  {'[green]yes[/]' if held else '[bold red]NO[/] '}  {what}", highlight=False)


def plot(results: Results, path: Path) -> Path:
    """Draw the accuracy over the share of samples that have their second stream, for each p."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True)
        _draw(left, results, ALONE)
        _draw(right, results, BOTH)
        left.set(ylabel="accuracy on test digits, %")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        seeds = len(results.left_on[ALONE, PS[0]])
        title = "A second stream that may be missing, and adapter dropout"
        if seeds > 1:
            title += f": mean and range of {seeds} seeds"
        figure.suptitle(title, fontsize=12, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _draw(axes: Axes, results: Results, trained: str) -> None:
    shares = [100 * share for share in SHARES]
    axes.axhline(100 * results.base, linestyle="--", color=LOSS, label="pretrained model")
    for p, (colour, mark) in zip(PS, LOOKS, strict=False):
        values = [[100 * value for value in results.accuracy[trained, p, share]] for share in SHARES]
        label = f"adapter dropout, p = {p:g}" if p else "no adapter dropout, p = 0"
        axes.plot(shares, list(map(statistics.fmean, values)), f"{mark}-", color=colour, markersize=6, label=label)
        axes.fill_between(shares, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0)
    axes.set(
        xlabel="test samples with their second stream, %",
        title=f"trained: adapters of {'the ' * (trained == ALONE)}{trained}",
    )
    axes.set_xticks(shares)


def run(out: Path, lengths: Lengths) -> Results:
    results = compare(lengths)
    print_tables(results)
    print("picture:", plot(results, out / "missing-modality.png"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run everything with fewer steps and one seed")
    default = Path(__file__).parent.parent / "build" / "examples"
    parser.add_argument("--out", type=Path, default=default, help="folder for the picture")
    arguments = parser.parse_args()
    short = Lengths(pretrain_steps=60, steps=12, seeds=1)
    results = run(arguments.out, short if arguments.short else Lengths())
    if not all(results.checks.values()):
        raise SystemExit("a check failed: see the NO above")


if __name__ == "__main__":
    main()
