"""LoRA on the convolutions of a small ResNet, on real data with no download: scikit-learn's digits.

    python examples/resnet.py [--short] [--out DIR]

1. Pretrain a small ResNet, made of plain ``nn.Conv2d``, on upright digits.
2. Adapt copies of it to digits rotated by 90 degrees: with LoRA on every convolution by this package and by PEFT, and
   by training all weights.
3. Compare accuracy, the parameters that are trained, what the forward keeps for the backward, and the time of a step.
4. Check that the adapter, merged or read by PEFT from its file, predicts as before.

The ResNet has group norm, as that of Kolesnikov et al., 2020 (arXiv:1912.11370). Batch norm would go on learning its
statistics from the rotated digits, and the base would not be what it was.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, field
from pathlib import Path

import _adapted
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _data import load_data
from _report import LOSS, ROTATED, STYLE, UPRIGHT
from digits import BATCH, accuracies, logits, same_predictions, time_steps, train
from torch import Tensor, nn

from lora_kernels import apply_lora, merge_and_unload, save_adapter, trainable_parameters

TARGETS = r"stem|.*\.(conv1|conv2|shortcut)"
RANK, ALPHA, DROPOUT = 8, 16, 0.1
OURS, PEFT, FULL = "LoRA, lora_kernels", "LoRA, PEFT", "all weights"
COLOURS = {OURS: UPRIGHT, PEFT: ROTATED, FULL: LOSS}


@dataclass(frozen=True)
class Lengths:
    pretrain_epochs: int = 12
    adapt_epochs: int = 10
    timed_rounds: int = 30


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 1×1 convolution where the size changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, inside), nn.GroupNorm(8, outside)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inside, H, W] → [B, outside, H / stride, W / stride]."""
        z = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return z + (x if self.shortcut is None else self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        stages = ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        self.blocks = nn.Sequential(*(Block(*sizes) for sizes in stages))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 8, 8] → logits [B, classes]."""
        return self.head(F.relu(self.blocks(self.stem(images[:, None]))).mean((2, 3)))


@dataclass
class Results(_adapted.Results):
    """What came out of each way to adapt the model."""

    saved: dict[str, int] = field(default_factory=dict)  # bytes


def contenders(pretrained: ResNet) -> dict[str, nn.Module]:
    """Return copies of the model that adapt in different ways. The first line is all that LoRA takes."""
    ours = copy.deepcopy(pretrained)
    print(apply_lora(ours, r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=TARGETS))
    models: dict[str, nn.Module] = {OURS: ours}
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        print("PEFT is not installed (pip install peft): its row is left out.")
    else:
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=TARGETS)
        models[PEFT] = get_peft_model(copy.deepcopy(pretrained), config)
    models[FULL] = copy.deepcopy(pretrained)
    return models


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return the bytes that a forward keeps for its backward, beside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        memory = t.untyped_storage()
        if memory.data_ptr() not in own:
            found[memory.data_ptr()] = memory.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = F.cross_entropy(model.train()(images), labels)
    loss.backward()
    model.zero_grad()
    return sum(found.values())


def check(model: nn.Module, pretrained: ResNet, images: Tensor, folder: Path) -> dict[str, tuple[bool, str]]:
    """Check what the adapter promises. The model is merged afterwards."""
    before, checks = logits(model, images), {}
    save_adapter(model, folder)
    try:
        from peft import PeftModel
    except ImportError:
        pass
    else:
        read = PeftModel.from_pretrained(copy.deepcopy(pretrained), folder)
        checks["read by PEFT from its file, it predicts alike"] = same_predictions(logits(read, images), before)
    merge_and_unload(model)
    checks["merged, it predicts as unmerged"] = same_predictions(logits(model, images), before)
    return checks


def plot(results: Results, path: Path) -> Path:
    """Draw the accuracies over the steps beside what is kept for the backward and the time of a step."""
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 4), width_ratios=(2, 1, 1))
        results.draw_curves(left, COLOURS)
        names = list(results.saved)
        for axes, values, what in (
            (middle, [results.saved[name] / 2**20 for name in names], "kept for the backward, MiB"),
            (right, [results.milliseconds(name) for name in names], "time of a step, ms"),
        ):
            bars = axes.bar(range(len(names)), values, color=[COLOURS[name] for name in names], width=0.65)
            axes.bar_label(bars, fmt="%.1f")
            axes.set(xlabel=what, xticks=[], ylim=(0, 1.1 * max(values)))
            axes.grid(visible=False, axis="x")
        figure.suptitle("The convolutions of a ResNet adapt to rotated digits", fontsize=13, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def run(out: Path, lengths: Lengths) -> Results:
    training, test = load_data()
    torch.manual_seed(0)
    pretrained, results = ResNet(), Results()
    train(pretrained, training.images, training.labels, test, lengths.pretrain_epochs, 3e-3, "pretrain")
    results.accuracy["pretrained"] = accuracies(pretrained, test)

    batch, labels = training.rotated[:BATCH], training.labels[:BATCH]
    models = contenders(pretrained)
    for name, model in models.items():
        results.parameters[name] = trainable_parameters(model).trainable
        results.saved[name] = saved_bytes(model, batch, labels)
    results.step_times = time_steps(copy.deepcopy(models), batch, labels, lengths.timed_rounds)
    for name, model in models.items():
        torch.manual_seed(1)
        rate = 1e-3 if name == FULL else 1e-2
        results.curves[name] = train(model, training.rotated, training.labels, test, lengths.adapt_epochs, rate, name)
        results.accuracy[name] = accuracies(model, test)
    results.checks = check(models[OURS], pretrained, test.rotated, out / "resnet-adapter")
    results.print_tables(
        "A ResNet adapts to rotated digits",
        "kept for\nthe backward",
        lambda name: f"{results.saved[name] / 2**20:.2f} MiB",
    )
    print("picture:", plot(results, out / "resnet.png"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run everything with fewer epochs")
    default = Path(__file__).parent.parent / "build" / "examples"
    parser.add_argument("--out", type=Path, default=default, help="folder for the picture and the adapter")
    arguments = parser.parse_args()
    short = Lengths(pretrain_epochs=3, adapt_epochs=3, timed_rounds=5)
    results = run(arguments.out, short if arguments.short else Lengths())
    if not all(held for held, _ in results.checks.values()):
        raise SystemExit("a check failed: see the NO above")


if __name__ == "__main__":
    main()
