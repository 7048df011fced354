"""A small PEFT model, one step of it, and the assertion that fusing it changes nothing."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_kernels
from lora_kernels.core import dropout
from lora_kernels.peft.fused import Fused


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 24, dtype=dtype)
        self.up, self.down = nn.Linear(24, 40, dtype=dtype), nn.Linear(40, 24, bias=False, dtype=dtype)
        self.head = nn.Linear(24, 3, dtype=dtype)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))


class Conv1DNet(nn.Module):
    """Two of GPT-2's linear layers, which store Wᵀ."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        conv = pytest.importorskip("transformers").pytorch_utils.Conv1D
        self.up, self.down = conv(40, 24).to(dtype), conv(24, 40).to(dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def config(**kwargs) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]} | kwargs))


def make(dtype: torch.dtype = torch.float32, net: type[nn.Module] = Net, **kwargs) -> PeftModel:
    """Return a PEFT model whose adapters differ from zero."""
    torch.manual_seed(0)
    model = get_peft_model(net(dtype), config(**kwargs))
    randomise(model)
    return model


def randomise(model: nn.Module, std: float = 0.3) -> None:
    """Make the adapters differ from zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, std)


def fused_layers(model: nn.Module) -> list[Fused]:
    return [module for module in model.modules() if isinstance(module, Fused)]


def run(model, x: torch.Tensor, of: nn.Module | None = None, **kwargs) -> dict[str, torch.Tensor]:
    """Return y and every gradient: those of the parameters of `of`, where `model` is another function of it."""
    owner = model if of is None else of
    owner.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = model(x, **kwargs)
    y.double().square().sum().backward()
    grads = {name: p.grad for name, p in owner.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | grads


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], rtol: float | None = None) -> None:
    assert got.keys() == want.keys() and len(got) > 2
    for name, value in want.items():
        atol = None if rtol is None else rtol * value.abs().max().item()
        torch.testing.assert_close(
            got[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert got[name].dtype == value.dtype


def fused_equals_peft(model: nn.Module, x: torch.Tensor, rtol: float | None = None, **kwargs) -> None:
    """Assert that every layer takes the fused path, and that nothing changes beyond rounding."""
    want = run(model, x, **kwargs)
    report = lora_kernels.fuse(model, strict=True)
    assert report.fused and not report.not_fused
    before = [layer.fused_calls for layer in fused_layers(model)]
    same(run(model, x, **kwargs), want, rtol)
    assert [layer.fused_calls for layer in fused_layers(model)] == [count + 1 for count in before]


class MaskOfSeed(nn.Module):
    """A dropout with the mask that this package draws from a seed."""

    def __init__(self, p: float, seed: torch.Tensor) -> None:
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x):
        return dropout.dropout(x.flatten(0, -2), self.p, self.seed).view_as(x) if self.training else x


def with_our_masks(
    model: PeftModel, p: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[PeftModel, Iterator[torch.Tensor]]:
    """Return a copy of `model` whose PEFT layers drop the same elements as the fused layers in one forward, and the
    iterator from which the fused layers take their seeds."""
    seeds, mine = (map(torch.tensor, itertools.count(100)) for _ in range(2))
    monkeypatch.setattr("lora_kernels.ops.prepare.draw_seed", lambda device: next(seeds))
    plain = copy.deepcopy(model)
    for name in ("up", "down"):
        plain.base_model.model.get_submodule(name).lora_dropout["default"] = MaskOfSeed(p, next(mine))
    return plain, seeds
