"""Which weights, and at which rank? The question of the LoRA paper's section 7, on a small model trained here.

    python examples/rank_sweep.py [--short] [--out DIR] [--record]

1. Pretrain the small vision transformer of digits.py on upright digits.
2. Adapt it to rotated digits with ranks from 1 to 64 on four choices of weights: {q}, {q, v}, {q, k, v, o} and all
   linear layers; and with the ranks that `lora_kernels.analysis.budget` gives each choice at one number of parameters.
   `lora_kernels.jobs` trains all of them in the same steps on one base, once for each seed.
3. Cut the rank 64 adapters of all linear layers to the lower ranks with `resize_adapter`, to compare with those that
   were trained at these ranks.
4. Show the accuracies over the rank and over the parameters, and how much the directions of a rank 8 and of a rank 64
   adapter of one layer have in common (the paper's figure 3).

One rule for all: the same steps, batches, AdamW and learning rate, with s = 8 / √r (rsLoRA). With s = α / r and one α
the updates of high ranks are held back, and a sweep over ranks then compares step sizes.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _data import Digits, load_data
from _sweep import plot, print_tables
from _vit import ViT
from digits import accuracies, logits, train
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import TensorDataset

from lora_kernels import load_adapter
from lora_kernels.analysis import budget, resize_adapter, subspace_similarity
from lora_kernels.jobs import Job, Jobs, LoRAConfig
from lora_kernels.testing import documents, machine

WEIGHTS = {
    "{q}": ["q"],
    "{q, v}": ["q", "v"],
    "{q, k, v, o}": ["q", "k", "v", "proj"],
    "all linear": ["q", "k", "v", "proj", "fc1", "fc2"],
}
RANKS = (1, 2, 4, 8, 16, 64)
EQUAL = 2
"""The rank of all linear layers whose cost every choice gets, too."""
COMPARED = (8, 64)
"""The ranks whose directions are compared, in the layer LAYER of {q, v}."""
LAYER, OF = "blocks.1.q", "{q, v}"
CUT = "all linear"
"""The weights whose adapters of the highest rank are cut to the lower ranks."""
RATE, ALPHA, BATCH = 5e-3, 8, 32
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "ranks"


@dataclass(frozen=True)
class Lengths:
    pretrain_epochs: int = 12
    steps: int = 100
    seeds: int = 3
    ranks: tuple[int, ...] = RANKS


SHORT = Lengths(pretrain_epochs=4, steps=20, seeds=2, ranks=(1, 8, 64))


def job(weights: str, r: int, data: TensorDataset, steps: int, seed: int) -> Job:
    return Job(
        f"{weights} r {r}",
        data,
        loss,
        LoRAConfig(r=r, lora_alpha=ALPHA, use_rslora=True, target_modules=WEIGHTS[weights]),
        batch_size=BATCH,
        optimizer=partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0, fused=True),
        schedule=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=RATE, total_steps=steps + 1, pct_start=0.25),
        max_grad_norm=1.0,
        steps=steps,
        seed=seed,
    )


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1], label_smoothing=0.1)


def sweep(model: ViT, training: Digits, test: Digits, lengths: Lengths) -> dict[str, Any]:
    """Return the points, the choices at equal cost, and the similarity of two adapters, as the document holds them."""
    equal = budget(model, r=EQUAL, groups=WEIGHTS)
    points = {
        (name, r): budget(model, r=r, groups={name: WEIGHTS[name]})[name] for name in WEIGHTS for r in lengths.ranks
    }
    points |= {(choice.name, choice.r): choice for choice in equal.choices}
    data = TensorDataset(training.rotated, training.labels)
    found: dict[tuple[str, int], list[float]] = {point: [] for point in points}
    cuts: dict[int, list[float]] = {r: [] for r in lengths.ranks[:-1]}
    trained: list[dict[int, tuple[Tensor, Tensor]]] = []
    words = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*words) as progress:
        for seed in range(lengths.seeds):
            jobs = Jobs(copy.deepcopy(model), [job(*point, data, lengths.steps, seed) for point in points])
            for _ in progress.track(range(lengths.steps), description=f"{len(points)} adapters, seed {seed}"):
                jobs.step()
            for name, r in points:
                with jobs.using(f"{name} r {r}"):
                    right = logits(jobs.model, test.rotated).argmax(1) == test.labels
                found[name, r].append(right.float().mean().item())
            for r, right in cut(jobs, f"{CUT} r {lengths.ranks[-1]}", model, test, list(cuts)).items():
                cuts[r].append(right)
            trained.append({r: factors(jobs, f"{OF} r {r}") for r in COMPARED})
    return {
        "points": [
            {"weights": name, "r": r, "parameters": choice.parameters, "accuracies": found[name, r]}
            for (name, r), choice in sorted(
                points.items(), key=lambda item: (list(WEIGHTS).index(item[0][0]), item[0][1])
            )
        ],
        "equal": {"parameters": equal.parameters, "ranks": {choice.name: choice.r for choice in equal.choices}},
        "cut": {
            "weights": CUT,
            "from": lengths.ranks[-1],
            "points": [{"r": r, "accuracies": values} for r, values in cuts.items()],
        },
        "similarity": similarity(trained),
    }


def cut(jobs: Jobs, name: str, model: ViT, test: Digits, ranks: list[int]) -> dict[int, float]:
    """Return the accuracy of a job's adapter cut to each rank, through its files."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs.save(name, folder)
        for r in ranks:
            resize_adapter(folder, f"{folder}/{r}", r=r)
            adapted = copy.deepcopy(model)
            load_adapter(adapted, f"{folder}/{r}")
            _, found[r] = accuracies(adapted, test)
    return found


def factors(jobs: Jobs, name: str) -> tuple[Tensor, Tensor]:
    """Return copies of A and B of a job in LAYER."""
    own = jobs.parameters(name)
    return own[f"{LAYER}.lora_A"].detach().clone(), own[f"{LAYER}.lora_B"].detach().clone()


def similarity(trained: list[dict[int, tuple[Tensor, Tensor]]]) -> dict[str, Any]:
    """Return φ(i, j) for i and j up to the lower rank. The two adapters began with different random numbers: from one
    seed, the first rows of both A would be the same."""
    low, high = COMPARED
    phi = subspace_similarity(trained[0][low], trained[1][high])[:low, :low]
    return {"layer": LAYER, "weights": OF, "ranks": COMPARED, "phi": phi.tolist(), "d": trained[0][low][0].shape[1]}


def run(out: Path, lengths: Lengths, command: str) -> dict[str, Any]:
    """Return the document of a run, which is written to `out` with the picture."""
    document = documents.begin(torch.device("cpu"), ("torch",), command)
    training, test = load_data()
    torch.manual_seed(0)
    model = ViT()
    train(model, training.images, training.labels, test, lengths.pretrain_epochs, 5e-3, "pretrain")
    upright, rotated = accuracies(model, test)
    document["setting"] = {
        "rate": RATE,
        "alpha": ALPHA,
        "batch": BATCH,
        "steps": lengths.steps,
        "seeds": lengths.seeds,
        "upright": upright,
        "rotated": rotated,
    }
    document |= sweep(model.eval(), training, test, lengths)
    print_tables(document)
    documents.write(document, out.with_suffix(".json"))
    plot(document, out.with_suffix(".png"))
    print(f"picture: {out.with_suffix('.png')}, numbers: {out.with_suffix('.json')}")
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run everything with fewer ranks and steps")
    default = Path(__file__).parent.parent / "build" / "examples"
    parser.add_argument("--out", type=Path, default=default, help="folder for the picture and the numbers")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/ranks/ for README")
    arguments = parser.parse_args()
    out = arguments.out / "rank_sweep"
    if arguments.record:
        device = machine.describe_device(torch.device("cpu"))
        out = RESULTS / f"{documents.begin(torch.device('cpu'), ())['date'][:10]}-{machine.kind(device)}"
    command = " ".join(
        ["python examples/rank_sweep.py", *["--short"] * arguments.short, *["--record"] * arguments.record]
    )
    run(out, SHORT if arguments.short else Lengths(), command)


if __name__ == "__main__":
    main()
