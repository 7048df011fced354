"""Hooks on parameters stay where a forward is checkpointed, and run once in each backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.layer_kinds import KINDS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    FusedLoRAConv2d,
    FusedLoRAEmbedding,
    FusedLoRALinear,
    Rows,
    lora_linear_experts,
    lora_linear_group,
    lora_linear_multi,
)
from lora_kernels.core.many import Adapter
from lora_kernels.core.operands import Layer
from lora_kernels.ops.around import add_low_rank
from lora_kernels.ops.shared import shared_lora_linear

Make = Callable[[], tuple[Callable[[Tensor], Any], list[Tensor], Tensor]]


def parameters(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def of_kind(kind: str) -> Make:
    def make() -> tuple[Callable[[Tensor], Any], list[Tensor], Tensor]:
        layer = FusedLoRALinear.from_linear(nn.Linear(64, 8), r=2, lora_dropout=0.2, **KINDS[kind])
        return layer, [p for p in layer.parameters() if p.requires_grad], torch.randn(3, 64)

    return make


def embedding() -> tuple[Callable[[Tensor], Any], list[Tensor], Tensor]:
    layer = FusedLoRAEmbedding.from_embedding(nn.Embedding(9, 4), r=2)
    return layer, [p for p in layer.parameters() if p.requires_grad], torch.randint(9, (5,))


def conv() -> tuple[Callable[[Tensor], Any], list[Tensor], Tensor]:
    layer = FusedLoRAConv2d.from_conv(nn.Conv2d(3, 4, 3), r=2)
    return layer, [layer.lora_A, layer.lora_B], torch.randn(1, 3, 5, 5)


W = torch.randn(6, 4)


def group() -> tuple[Callable[[Tensor], Any], list[Tensor], Tensor]:
    a, b, other_a, other_b = ps = parameters((2, 4), (6, 2), (2, 4), (6, 2))
    return (
        lambda x: sum(lora_linear_group(x, [Layer(W, a, b, 1.0), Layer(W, other_a, other_b, 1.0)])),
        ps,
        torch.randn(3, 4),
    )


def many() -> tuple[Callable[[Tensor], Any], list[Tensor], Tensor]:
    a, b = ps = parameters((2, 4), (6, 2))
    return lambda x: lora_linear_multi(x, W, [Adapter(a, b, 1.0)], Rows.by_id([0, -1, 0], 1)), ps, torch.randn(3, 4)


def experts() -> tuple[Callable[[Tensor], Any], list[Tensor], Tensor]:
    a, b = ps = parameters((1, 2, 4), (1, 6, 2))
    rows = Rows.by_id([0, 0, 0], 1)
    return lambda x: lora_linear_experts(x, W[None], a, b, rows, scale=1.0), ps, torch.randn(3, 4)


def shared() -> tuple[Callable[[Tensor], Any], list[Tensor], Tensor]:
    u, v = ps = parameters((2,), (6,))
    return (
        lambda x: shared_lora_linear(x, W, torch.ones(2, 4), torch.ones(6, 2), u, v, scale=1.0),
        ps,
        torch.randn(3, 4),
    )


def around() -> tuple[Callable[[Tensor], Any], list[Tensor], Tensor]:
    a, b = ps = parameters((2, 4), (6, 2))
    return lambda x: add_low_rank(x @ W.t(), x, a, b, scale=1.0), ps, torch.randn(3, 4)


CASES = {kind: of_kind(kind) for kind in KINDS} | {
    f.__name__: f for f in (embedding, conv, group, many, experts, shared, around)
}


@pytest.mark.parametrize("case", CASES)
def test_hooks_of_parameters_run_in_every_backward(case: str) -> None:
    """torch before 2.13 takes them off as the backward of any autograd Function has read what it has saved."""
    call, ps, x = CASES[case]()
    counts = [0] * len(ps)

    def count(i: int) -> None:
        counts[i] += 1

    for i, p in enumerate(ps):
        p.register_hook(lambda _, i=i: count(i))
    for _ in range(2):
        checkpoint(call, x, use_reentrant=False).square().sum().backward()
    call(x).square().sum().backward()
    assert counts == [3] * len(ps)
