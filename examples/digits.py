"""LoRA from start to finish on real data with no download: scikit-learn's digits (1,797 labelled 8×8 images).

    python examples/digits.py [--short] [--out DIR]

1. Pretrain a small vision transformer, made of plain ``nn.Linear``, on upright digits.
2. Adapt it to digits rotated by 90 degrees: a FusedLoRALinear for every linear of every block, all else frozen.
3. Check what an adapter promises: switched off it changes nothing, merged it predicts the same, and its file is small.
4. Time a training step beside PEFT's LoRA on the same model, and beside the frozen model, which no LoRA can beat.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from _data import Digits, load_data, shift
from _report import Curves, plot, print_tables
from _vit import TOKENS, ViT
from torch import Tensor, nn
from tqdm import tqdm

from lora_kernels import FusedLoRALinear, explain

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
RANK, ALPHA, DROPOUT = 8, 16, 0.1
BATCH = 64


@dataclass(frozen=True)
class Lengths:
    pretrain_epochs: int = 18
    adapt_epochs: int = 12
    timed_rounds: int = 40


@dataclass
class Results:
    """The results of a run, which `_report.print_tables` shows."""

    accuracy: dict[str, tuple[float, float]] = field(default_factory=dict)  # upright, rotated
    checks: dict[str, tuple[bool, str]] = field(default_factory=dict)  # whether it holds, and a remark
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # parameters, bytes on disk
    step_times: dict[str, list[float]] = field(default_factory=dict)  # seconds


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)


def accuracies(model: nn.Module, test: Digits) -> tuple[float, float]:
    """Return the fractions of the upright and of the rotated test images that are predicted right."""
    upright, rotated = (
        (logits(model, images).argmax(1) == test.labels).float().mean().item() for images in (test.images, test.rotated)
    )
    return upright, rotated


def train(model: nn.Module, images: Tensor, labels: Tensor, test: Digits, epochs: int, lr: float, title: str) -> Curves:
    """Train the parameters that require a gradient, by AdamW with a one-cycle learning rate."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr, weight_decay=0.05, fused=True)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.25)
    curves = Curves()
    curves.add_accuracy(*accuracies(model, test))
    with tqdm(total=epochs * steps, desc=title, unit="step") as bar:
        for _ in range(epochs):
            model.train()
            for batch in torch.randperm(len(images))[: steps * BATCH].split(BATCH):
                loss = F.cross_entropy(model(shift(images[batch])), labels[batch], label_smoothing=0.1)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                curves.loss.append(loss.item())
                bar.update()
            upright, rotated = accuracies(model, test)
            curves.add_accuracy(upright, rotated)
            bar.set_postfix_str(f"loss {loss.item():.2f}, test accuracy: upright {upright:.1%}, rotated {rotated:.1%}")
    return curves


def with_adapters(model: ViT) -> ViT:
    """Return a frozen copy of the model with a LoRA adapter on every linear of every block. That is all it takes."""
    model = copy.deepcopy(model).requires_grad_(False)
    for block in model.blocks:
        for name in TARGETS:
            linear = getattr(block, name)
            setattr(block, name, FusedLoRALinear.from_linear(linear, r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT))
    return model


def adapters(model: nn.Module) -> list[FusedLoRALinear]:
    return [module for module in model.modules() if isinstance(module, FusedLoRALinear)]


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    try:
        from safetensors.torch import save_file
    except ImportError:
        path = path.with_suffix(".pt")
        torch.save(tensors, path)
    else:
        path = path.with_suffix(".safetensors")
        save_file(tensors, path)
    return path


def load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    from safetensors.torch import load_file

    return load_file(path)


def check(pretrained: ViT, adapted: ViT, test: Digits, out: Path) -> Results:
    """Measure accuracies and sizes, and check what the adapter promises."""
    results = Results()
    before, after = logits(pretrained, test.images), logits(adapted, test.rotated)
    results.accuracy["pretrained"] = accuracies(pretrained, test)
    results.accuracy["with the adapter"] = accuracies(adapted, test)

    # Merging sets weight ← W + s·B·A. The model then runs at the speed of plain linears.
    for layer in adapters(adapted):
        layer.merge()
    results.accuracy["adapter merged"] = accuracies(adapted, test)
    results.checks["merged, it predicts as unmerged"] = same_predictions(logits(adapted, test.rotated), after)
    for layer in adapters(adapted):
        layer.unmerge()

    # With scaling 0 the adapter is off: it adds nothing.
    for layer in adapters(adapted):
        layer.scaling = 0.0
    results.accuracy["adapter off (scaling 0)"] = accuracies(adapted, test)
    results.checks["off, it predicts as before adapting"] = same_predictions(logits(adapted, test.images), before)
    for layer in adapters(adapted):
        layer.scaling = ALPHA / RANK

    weights, state = pretrained.state_dict(), adapted.state_dict()
    same = all(torch.equal(state[name], weights[name]) for name in weights)
    results.checks["every weight of the base is what it was"] = same, "bit for bit"

    # The file of the adapter alone is loaded into a fresh copy of the pretrained model.
    adapter = {name: tensor for name, tensor in state.items() if "lora_" in name}
    file = save(adapter, out / "adapter")
    reloaded = with_adapters(pretrained)
    reloaded.load_state_dict(load(file), strict=False)  # not strict, since the file holds no weights of the base
    results.accuracy["adapter loaded from its file"] = accuracies(reloaded, test)
    results.checks["loaded from its file, it predicts alike"] = same_predictions(logits(reloaded, test.rotated), after)

    results.sizes["model"] = count(weights), save(weights, out / "model").stat().st_size
    results.sizes["adapter"] = count(adapter), file.stat().st_size
    return results


def same_predictions(left: Tensor, right: Tensor) -> tuple[bool, str]:
    difference = (left - right).abs().max().item()
    return torch.equal(left.argmax(1), right.argmax(1)), f"logits differ by {difference:.1g} at most"


def count(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def contenders(pretrained: ViT) -> dict[str, nn.Module]:
    """Return the models whose training steps are timed against each other."""
    # The floor has no adapter, but gradients must reach q, k and v of the first block as with LoRA: train their biases.
    floor = copy.deepcopy(pretrained).requires_grad_(False)
    for name in ("q", "k", "v"):
        floor.blocks[0].get_submodule(name).bias.requires_grad_(True)
    models: dict[str, nn.Module] = {"frozen, no adapter: the floor": floor, "lora_kernels": with_adapters(pretrained)}
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        print("PEFT is not installed (pip install peft): its row is left out.")
    else:
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(TARGETS))
        models["PEFT"] = get_peft_model(copy.deepcopy(pretrained), config)
    return models


def time_steps(models: dict[str, nn.Module], images: Tensor, labels: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return seconds per training step on one batch. The models take turns, so that other load slows all of them
    alike."""
    optimizers = {
        name: torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], 1e-4, fused=True)
        for name, model in models.items()
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    warm_up = 3
    for i in tqdm(range(warm_up + rounds), desc="time a step", unit="round"):
        for name, model in models.items():
            start = time.perf_counter()
            F.cross_entropy(model(images), labels).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def run(out: Path, lengths: Lengths) -> Results:
    out.mkdir(parents=True, exist_ok=True)
    training, test = load_data()

    torch.manual_seed(0)
    pretrained = ViT()
    first = train(pretrained, training.images, training.labels, test, lengths.pretrain_epochs, 5e-3, "pretrain")

    torch.manual_seed(1)
    adapted = with_adapters(pretrained)
    layer = adapted.blocks[0].fc1
    tokens = torch.empty(BATCH * TOKENS, layer.in_features)
    print(explain(tokens, layer.weight, layer.lora_A, layer.lora_B, bias=layer.bias, dropout_p=DROPOUT))
    second = train(adapted, training.rotated, training.labels, test, lengths.adapt_epochs, 1e-2, "adapt")

    results = check(pretrained, adapted, test, out)
    batch, labels = training.rotated[:BATCH], training.labels[:BATCH]
    results.step_times = time_steps(contenders(pretrained), batch, labels, lengths.timed_rounds)
    print_tables(results)
    off, _ = results.accuracy["adapter off (scaling 0)"]
    print("curves:", plot(first, second, off, out / "digits.png"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run everything with fewer epochs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the files")
    arguments = parser.parse_args()
    lengths = Lengths(pretrain_epochs=6, adapt_epochs=5, timed_rounds=10) if arguments.short else Lengths()
    results = run(arguments.out, lengths)
    if not all(held for held, _ in results.checks.values()):
        raise SystemExit("a check failed: see the NO above")


if __name__ == "__main__":
    main()
