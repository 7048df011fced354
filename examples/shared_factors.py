"""What VeRA and Tied-LoRA buy, and what they cost, on real data with no download: scikit-learn's digits.

    python examples/shared_factors.py [--short] [--out DIR]

1. Pretrain a small vision transformer, made of plain ``nn.Linear``, on upright digits.
2. Adapt copies of it to digits rotated by 90 degrees: with LoRA of rank 8 and 1, with Tied-LoRA, and with VeRA.
3. Compare accuracy, the parameters that are trained, the size of the file, and the time of a step.
4. Check that VeRA's file, read into the pretrained model, predicts as before: by this package, and by PEFT.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import _adapted
import matplotlib.pyplot as plt
import torch
from _data import load_data
from _report import LOSS, ROTATED, STYLE, UPRIGHT
from _vit import ViT
from digits import BATCH, accuracies, logits, same_predictions, time_steps, train
from torch import nn

from lora_kernels import apply_lora, apply_tied_lora, apply_vera, load_adapter, save_adapter, trainable_parameters

TARGETS = ["q", "k", "v", "proj", "fc1", "fc2"]
LORA, SMALL, TIED, VERA = "LoRA, r 8", "LoRA, r 1", "Tied-LoRA, r 8", "VeRA, r 64"
WAYS: dict[str, tuple[Callable[[nn.Module], object], float]] = {
    LORA: (partial(apply_lora, r=8, lora_alpha=16, target_modules=TARGETS), 1e-2),
    SMALL: (partial(apply_lora, r=1, lora_alpha=2, target_modules=TARGETS), 1e-2),
    TIED: (partial(apply_tied_lora, r=8, lora_alpha=16, target_modules=TARGETS), 1e-2),
    VERA: (partial(apply_vera, r=64, save_projection=False, target_modules=TARGETS), 5e-2),
}
"""What puts the adapters into a model, and the learning rate. VeRA's is larger, as in its paper."""
COLOURS = {LORA: UPRIGHT, SMALL: "#63b3ed", TIED: LOSS, VERA: ROTATED}


@dataclass(frozen=True)
class Lengths:
    pretrain_epochs: int = 14
    adapt_epochs: int = 10
    timed_rounds: int = 30


@dataclass
class Results(_adapted.Results):
    """What came out of each way to adapt the model."""

    files: dict[str, int] = field(default_factory=dict)  # bytes


def check(model: nn.Module, pretrained: ViT, images: torch.Tensor, folder: Path) -> dict[str, tuple[bool, str]]:
    """Check that the adapter in `folder` is that of `model`."""
    before, own = logits(model, images), copy.deepcopy(pretrained)
    load_adapter(own, folder)
    checks = {"read from its file, VeRA predicts alike": same_predictions(logits(own, images), before)}
    try:
        from peft import PeftModel
    except ImportError:
        print("PEFT is not installed (pip install peft): it does not read the file.")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file without A and B, which PEFT draws anew
            theirs = PeftModel.from_pretrained(copy.deepcopy(pretrained), folder)
        checks["read by PEFT from its file, too"] = same_predictions(logits(theirs, images), before)
    return checks


def plot(results: Results, path: Path) -> Path:
    """Draw the accuracies over the steps, beside accuracy over the number of trained parameters."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, width_ratios=(3, 2))
        for name in results.curves:
            at = results.parameters[name], 100 * results.accuracy[name][1]
            right.plot(*at, "o", color=COLOURS[name], markersize=9)
            right.annotate(name, at, (0, -14), textcoords="offset points", ha="center", color=COLOURS[name])
        results.draw_curves(left, COLOURS)
        right.set(xlabel="trained parameters", xscale="log")
        right.set_xticks([3_000, 10_000, 30_000], ["3,000", "10,000", "30,000"])
        right.minorticks_off()
        right.margins(x=0.25)
        figure.suptitle("Fewer trained parameters, by sharing A and B", fontsize=13, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def run(out: Path, lengths: Lengths) -> Results:
    training, test = load_data()
    torch.manual_seed(0)
    pretrained, results = ViT(), Results()
    train(pretrained, training.images, training.labels, test, lengths.pretrain_epochs, 3e-3, "pretrain")
    results.accuracy["pretrained"] = accuracies(pretrained, test)

    models: dict[str, nn.Module] = {}
    for name, (put, _) in WAYS.items():
        models[name] = copy.deepcopy(pretrained)
        put(models[name])
        results.parameters[name] = trainable_parameters(models[name]).trainable
    batch, labels = training.rotated[:BATCH], training.labels[:BATCH]
    results.step_times = time_steps(copy.deepcopy(models), batch, labels, lengths.timed_rounds)
    for name, model in models.items():
        torch.manual_seed(1)
        rate = WAYS[name][1]
        results.curves[name] = train(model, training.rotated, training.labels, test, lengths.adapt_epochs, rate, name)
        results.accuracy[name] = accuracies(model, test)
        folder = out / "shared-factors" / name.replace(",", "").replace(" ", "-").lower()
        save_adapter(model, folder)
        results.files[name] = (folder / "adapter_model.safetensors").stat().st_size
        if name == VERA:
            results.checks = check(model, pretrained, test.rotated, folder)
    results.print_tables(
        "A classifier adapts to rotated digits", "file", lambda name: f"{results.files[name] / 1024:,.0f} KiB"
    )
    print("picture:", plot(results, out / "shared-factors.png"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run everything with fewer epochs")
    default = Path(__file__).parent.parent / "build" / "examples"
    parser.add_argument("--out", type=Path, default=default, help="folder for the picture and the adapters")
    arguments = parser.parse_args()
    short = Lengths(pretrain_epochs=3, adapt_epochs=2, timed_rounds=5)
    results = run(arguments.out, short if arguments.short else Lengths())
    if not all(held for held, _ in results.checks.values()):
        raise SystemExit("a check failed: see the NO above")


if __name__ == "__main__":
    main()
