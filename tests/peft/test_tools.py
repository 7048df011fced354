"""Tools that look on a fused model find what they find in PEFT's: groups of layers, and bitsandbytes' weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoraConfig, get_peft_model

import lora_kernels

NAMES = ["q_proj", "k_proj", "v_proj"]


class Attention(nn.Module):
    """Three layers over one x, which a group computes in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.v_proj(x) * self.k_proj(x)


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    """PEFT's model, and a copy of it that is fused with a group."""
    config = LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False)
    wrapped = get_peft_model(nn.Sequential(Attention()), config)
    fused = copy.deepcopy(wrapped)
    assert lora_kernels.fuse(fused, group=True).groups
    return wrapped.base_model.model, fused.base_model.model


def flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


def test_a_group_is_traced_and_exported_as_its_layers(models):
    wrapped, fused = (model.eval() for model in models)
    x = torch.randn(5, 16)
    traced = torch.jit.trace(fused, x)
    exported = torch.export.export(fused, (x,)).module()
    for run in (traced, exported, fused):
        torch.testing.assert_close(run(2 * x), wrapped(2 * x))


def test_a_group_counts_the_flops_of_its_layers(models):
    x = torch.randn(5, 16, requires_grad=True)
    wanted, counted = (flops(model, x) for model in models)
    assert counted == wanted > 0


def test_a_group_takes_nested_tensors_and_gradients_by_sample(models):
    wrapped, fused = models
    x = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=torch.jagged)
    torch.testing.assert_close(fused(x).values(), wrapped(x).values())
    trained = {name: p.detach() for name, p in fused.named_parameters() if p.requires_grad}
    got, want = (
        torch.func.vmap(
            torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x[None],)).sum()),  # noqa: B023
            (None, 0),
        )(trained, torch.ones(2, 16))
        for model in (fused, wrapped)
    )
    torch.testing.assert_close(got, want)


def test_a_layer_over_bitsandbytes_weight_is_traced_and_takes_nested_tensors():
    bnb_models = pytest.importorskip("support.bnb_models", reason="bitsandbytes is not installed")
    wrapped = bnb_models.make()
    assert not lora_kernels.fuse(wrapped).not_fused
    fused, x = wrapped.base_model.model, torch.randn(5, 64)
    torch.testing.assert_close(torch.jit.trace(fused, x)(2 * x), fused(2 * x))
    nested = torch.nested.nested_tensor(list(x.split((2, 3))), layout=torch.jagged)
    torch.testing.assert_close(fused(nested).values(), fused(x))  # PEFT's own forward raises


def test_families_may_come_from_an_iterator():
    config = LoraConfig(r=4, target_modules=NAMES)
    model = get_peft_model(nn.Sequential(Attention()), config)
    (group,) = lora_kernels.fuse(model, group=iter([iter(("q_proj", "v_proj"))])).groups.values()
    assert group.names == ("q_proj", "v_proj")
    with pytest.raises(ValueError, match="group must be True, or families"):
        lora_kernels.fuse(model, group="q_proj")
