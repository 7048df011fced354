"""Train the two adapters that docs/analysis.md looks at, and put the output of ``analyse`` and two pictures there.

    python scripts/analysis_page.py

The adapters, of rank 8 and of rank 64, adapt one small vision transformer to digits that are rotated by 90 degrees,
from different seeds. It takes about a minute on two cores, and takes the adapters in build/analysis where there are
some.
"""

from __future__ import annotations

import copy
import re
import shutil
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from _data import load_data, shift  # noqa: E402  # beside the examples
from _vit import ViT  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lora_kernels import apply_lora, save_adapter  # noqa: E402
from lora_kernels.analysis import analyse  # noqa: E402

PAGE, PICTURES = ROOT / "docs" / "analysis.md", ROOT / "docs" / "assets" / "analysis"
RUN = ROOT / "build" / "analysis"
TARGETS = ["q", "v"]
SHOWN = ("similarity_q.png", "amplification.png")
BATCH, PRETRAIN, ADAPT = 64, 12, 8


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float, title: str) -> None:
    """Train what requires a gradient, by AdamW with a one-cycle learning rate."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    for _ in track(range(epochs), title, console=Console(stderr=True)):
        for batch in torch.randperm(len(images))[: steps * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(model(shift(images[batch])), labels[batch], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def make_adapters() -> None:
    """Train the model and both adapters, and save them below build/analysis."""
    torch.manual_seed(0)
    data, test = load_data()
    base = ViT()
    train(base, data.images, data.labels, PRETRAIN, 2e-3, "Pretraining")
    save_file(base.state_dict(), RUN / "base.safetensors")
    for r in (8, 64):
        torch.manual_seed(r)
        model = copy.deepcopy(base)
        apply_lora(model, r=r, lora_alpha=2 * r, target_modules=TARGETS)
        train(model, data.rotated, data.labels, ADAPT, 2e-3, f"Adapting, r {r}")
        with torch.no_grad():
            right = (model.eval()(test.rotated).argmax(1) == test.labels).float().mean()
        print(f"r {r}: {right:.1%} of the rotated test digits")
        save_adapter(model, RUN / f"r{r}")


def main() -> None:
    """Analyse the adapters, and write the page's block and pictures."""
    RUN.mkdir(parents=True, exist_ok=True)
    PICTURES.mkdir(parents=True, exist_ok=True)
    if not (RUN / "r64").exists():
        make_adapters()
    report = analyse(RUN / "r8", RUN / "r64", RUN / "base.safetensors")
    for path in report.plot(RUN / "plots"):
        if path.name in SHOWN:
            shutil.copy(path, PICTURES)
    text = report.table().replace(f"{RUN}/", "")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("Of each module"))
    block = f"<!-- run:begin -->\n```text\n{text.strip()}\n```\n<!-- run:end -->"
    page = PAGE.read_text()
    PAGE.write_text(re.sub(r"<!-- run:begin -->.*<!-- run:end -->", lambda _: block, page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
