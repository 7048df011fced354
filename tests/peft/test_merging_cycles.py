"""A thousand merges and unmerges, as reinforcement learning with another engine makes them, leave every bit of W."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from support.merge_models import K, N, make, over  # noqa: E402

import lora_kernels  # noqa: E402

CYCLES = 1000


def trained(layer) -> list[torch.Tensor]:
    return [p for name, p in layer.named_parameters() if "lora_" in name]


def cycled(merge, unmerge, adapters, steps, cycles=CYCLES) -> None:
    """Merge and unmerge, and move A and B in between and while merged."""
    for i in range(cycles):
        merge()
        if i % 2:
            adapters[i % len(adapters)].data.add_(steps[i % len(adapters)])
        unmerge()
        adapters[i % len(adapters)].data.add_(steps[i % len(adapters)])


@pytest.mark.parametrize("kind", ["bf16", "fp16", "nf4", "int8"])
def test_a_thousand_cycles_change_no_bit(kind):
    dense = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind)
    model = over(kind) if dense is None else make("linear", dense)[0]
    x = torch.randn(3, K, dtype=dense)
    lora_kernels.fuse(model, strict=True)
    layer = model.train().base_model.model.layer
    base, weight = layer.base_layer, layer.base_layer.weight
    bits = weight.detach().clone()
    first, adapters = model(x), trained(layer)
    start = [p.detach().clone() for p in adapters]
    steps = [1e-5 * torch.randn_like(p) for p in adapters]
    merged = []
    cycled(lambda: merged.append(layer.merge()), layer.unmerge, adapters, steps)
    assert layer.base_layer is base and base.weight is weight and torch.equal(weight, bits)
    assert not torch.equal(model(x), first)
    for p, value in zip(adapters, start, strict=True):
        p.data.copy_(value)
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_our_own_layers_keep_every_bit_as_well(kind):
    linear = nn.Linear(K, N, dtype=torch.bfloat16)
    made = {"r": 4, "lora_alpha": 6}
    if kind == "bf16":
        layer = lora_kernels.FusedLoRALinear.from_linear(linear, **made)
        merge = layer.merge
    else:
        layer = lora_kernels.QuantizedLoRALinear.from_linear(linear, **made, quant="nf4")
        merge = lambda: layer.merge(lossy=True)  # noqa: E731
    adapters = [layer.lora_A, layer.lora_B]
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.1)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    first, start = layer(x), [p.detach().clone() for p in adapters]
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    cycled(merge, layer.unmerge, adapters, [1e-5 * torch.randn_like(p) for p in adapters], CYCLES // 5)
    for p, value in zip(adapters, start, strict=True):
        p.data.copy_(value)
    assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())
    assert torch.equal(layer(x), first)
