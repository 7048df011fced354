"""A model of blocks with ResLoRA, and the same in plain torch operations by the formulas of the paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.models.residual import apply_reslora

K, N = 7, 11
KINDS = ("q", "up", "down")


class Block(nn.Module):
    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.q, self.up, self.down = nn.Linear(k, k, bias=False), nn.Linear(k, n), nn.Linear(n, k)
        self.reentrant: bool | None = None

    def own(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(torch.tanh(self.q(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x) if self.reentrant is None else checkpoint(self.own, x, use_reentrant=self.reentrant)


class Blocks(nn.Module):
    """Three blocks with adapters, and a head without one."""

    def __init__(self, k: int = K, n: int = N) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(k, n) for _ in range(3))
        self.head = nn.Linear(k, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def fill(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every B values that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) / 3)
    return model


def made(
    structure: str, previous: int | None = 1, dtype: torch.dtype = torch.float64, sizes=(K, N), **more
) -> nn.Module:
    """Return `Blocks` with ResLoRA of rank 3 and values that are not zero."""
    torch.manual_seed(0)
    model = Blocks(*sizes).to(dtype)
    apply_reslora(model, structure, previous=previous, **{"r": 3, "lora_alpha": 4, "exclude_modules": ["head"], **more})
    return fill(model)


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def by_formula(
    model: nn.Module, x: Tensor, structure: str, previous: int | None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return y of the model in `dtype`, x as a leaf, and A and B of every layer as leaves, by the formulas. Nothing of
    the package computes here; from the model come only values. A and B keep their dtype where it is fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: p.detach().to(wide if p.dtype == torch.float32 else dtype).requires_grad_()
        for name, p in adapters(model).items()
    }
    x = x.detach().to(dtype).requires_grad_()
    reads: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    s, count = 4 / 3, 3 if previous is None else previous

    def layer(n: int, kind: str, x: Tensor) -> Tensor:
        plain = model.blocks[n].get_submodule(kind)
        a = [leaves[f"blocks.{i}.{kind}.lora_A"] for i in range(n + 1)]
        b = [leaves[f"blocks.{i}.{kind}.lora_B"] for i in range(n + 1)]
        x_a = x.to(a[0].dtype)
        reads[kind].append(x_a)
        first = max(0, n - count)
        if structure == "bs":
            update = sum(x_a @ a[i].T @ b[i].T for i in range(first, n + 1))
        elif structure == "is":
            update = (x_a + reads[kind][max(n - 1, 0)]) @ a[n].T @ b[n].T
        else:
            update = sum(reads[kind][i] @ a[i].T for i in range(first, n + 1)) @ b[n].T
        weight, bias = plain.weight.to(dtype), None if plain.bias is None else plain.bias.to(dtype)
        return F.linear(x, weight, bias) + (s * update).to(dtype)

    y = x
    for n in range(3):
        y = y + layer(n, "down", torch.tanh(layer(n, "up", torch.tanh(layer(n, "q", y)))))
    return F.linear(y, model.head.weight.to(dtype), model.head.bias.to(dtype)), x, leaves


def gradients(y: Tensor, x: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of ‖y‖² by name, with that of x under "x"."""
    dy = y.float() if y.dtype.itemsize == 2 else y
    found = torch.autograd.grad(dy.square().sum(), [x, *leaves.values()])
    return dict(zip(["x", *leaves], found, strict=True))
