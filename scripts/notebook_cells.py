"""The cells of examples/first_steps.ipynb, which ``python scripts/notebook.py`` makes. This file runs too."""

# ruff: noqa: E402

# %% [markdown]
# # First steps with lora_kernels
#
# A layer with LoRA computes `y = x Wᵀ + bias + s·(dropout(x) Aᵀ) Bᵀ`. W is frozen; A and B are trained. This notebook
# puts adapters into a small network, trains them on scikit-learn's handwritten digits, saves the adapter, and measures
# a layer beside PEFT's. It runs on a CPU in less than a minute and downloads nothing.

# %%
import tempfile
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import lora_kernels

torch.manual_seed(0)
print("lora_kernels", lora_kernels.__version__, "· torch", torch.__version__)

# %% [markdown]
# ## A task, and a task that is like it
#
# 1,797 pictures of 8×8 pixels. The network first learns upright digits, all of it. Then the digits lie on their side.

# %%
images, labels = (torch.tensor(t) for t in load_digits(return_X_y=True))
images = images.float().reshape(-1, 8, 8) / 16
upright, turned = images.reshape(-1, 64), images.rot90(1, (1, 2)).reshape(-1, 64)
train, test = slice(0, 1400), slice(1400, None)


def fit(model, x, steps, lr):
    """Train what requires a gradient, and return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        rows = torch.randint(1400, (128,))
        loss = nn.functional.cross_entropy(model(x[train][rows]), labels[train][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model, x):
    """Return the part of the test pictures that are named right."""
    return (model.eval()(x[test]).argmax(1) == labels[test]).double().mean().item()


model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
fit(model, upright, 300, 2e-3)
print(f"upright {accuracy(model, upright):.0%}, turned {accuracy(model, turned):.0%}")

# %% [markdown]
# ## Adapters
#
# `apply_lora` freezes the model and puts an adapter into each linear layer. It returns a report.

# %%
report = lora_kernels.apply_lora(model, r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
print(report)
before = accuracy(model, turned)
losses = fit(model.train(), turned, 300, 5e-3)
after = accuracy(model, turned)
parameters = sum(p.numel() for p in lora_kernels.adapter_parameters(model))
print(f"turned {before:.0%} → {after:.0%} with {parameters:,} trained numbers")

# %%
plt.figure(figsize=(6, 2.6))
plt.plot(losses, linewidth=1)
plt.xlabel("step")
plt.ylabel("loss")
plt.title(f"Adapters of rank 8 on turned digits: {before:.0%} → {after:.0%}")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Save, load, merge
#
# The file is PEFT's format. After `merge_and_unload` the model has plain `nn.Linear` layers again.

# %%
with tempfile.TemporaryDirectory() as folder:
    lora_kernels.save_adapter(model, folder)
    lora_kernels.load_adapter(model, folder)
merged = lora_kernels.merge_and_unload(model)
print(merged[0], f"· turned {accuracy(merged, turned):.0%}")

# %% [markdown]
# ## A layer beside PEFT's
#
# `fuse` is the one line for a PEFT model. The times are of this machine, at the moment of the run;
# `python -m lora_kernels bench` measures with more care.

# %%
import peft


def layer_of_peft():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_dropout=0.1, target_modules=["0"], init_lora_weights=False)
    return peft.get_peft_model(nn.Sequential(nn.Linear(512, 512)), config).train()


def milliseconds(layers, rounds=15):
    """Return the median time of a forward and backward over 512 rows of each layer, which take turns."""
    x = torch.randn(512, 512, requires_grad=True)
    times = {name: [] for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            start = time.perf_counter()
            layer(x).sum().backward()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(taken)[rounds // 2] * 1e3 for name, taken in times.items()}


plain, fused = layer_of_peft(), layer_of_peft()
print(lora_kernels.fuse(fused, strict=True))
x = torch.randn(4, 512)
print("largest difference without dropout:", (plain.eval()(x) - fused.eval()(x)).abs().max().item())
layers = {
    "frozen layer": nn.Linear(512, 512).requires_grad_(False),
    "PEFT": plain.train(),
    "PEFT, fused": fused.train(),
}
print(f"{'layer':<14}{'forward + backward':>20}")
for name, taken in milliseconds(layers).items():
    print(f"{name:<14}{taken:>17.2f} ms")

# %% [markdown]
# ## What next
#
# - A PEFT, transformers or TRL model: `docs/peft.md` and the recipes in `docs/recipes`.
# - 4-bit weights: `lora_kernels.apply_lora(model, quant="nf4")`, `docs/qlora.md`.
# - What an adapter has learned: `python -m lora_kernels analyse DIR`, `docs/analysis.md`.
# - Something is wrong: `python -m lora_kernels doctor`.
