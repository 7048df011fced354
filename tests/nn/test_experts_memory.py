"""A step of experts keeps the sorted x and h beside what the frozen experts keep, and makes nothing of a stack's
size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="transformers is not installed")
from support.experts import Inputs, experts_of, inputs

from lora_kernels import FusedLoRAExperts

E, H, I, R, T, K = 8, 64, 32, 4, 16, 2  # noqa: E741
ROWS, SIZE = T * K, 4
STACK = E * H * I * SIZE
"""The bytes of the smaller stack, which all other tensors are far below."""


def made(family: str, dropout: float = 0.0) -> tuple[nn.Module, FusedLoRAExperts, Inputs]:
    sizes = {"hidden_size": H, "moe_intermediate_size": I, "intermediate_size": I}
    module = experts_of(family, implementation="grouped_mm", num_experts=E, num_local_experts=E, **sizes)
    module.requires_grad_(False)
    layer = FusedLoRAExperts.from_experts(module, r=R, lora_dropout=dropout)
    for name in layer.target_parameters:
        nn.init.normal_(layer.pair(name)[1])
    return module, layer, inputs(tokens=T, k=K, experts=E, hidden=H)


def saved(run: Callable[..., Tensor], given: Inputs, module: nn.Module) -> dict[int, int]:
    """Return the bytes of each storage that autograd keeps beside x, the weights and the parameters."""
    x, weights = given.x.clone().requires_grad_(), given.weights.clone().requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, weights, *module.parameters())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(x, given.ids, weights)
    assert y.requires_grad
    return {pointer: t.untyped_storage().nbytes() for pointer, t in kept.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_a_step_keeps_both_sorted_x_and_h_beside_what_the_frozen_experts_keep(family, dropout):
    frozen, layer, given = made(family, dropout)
    before, after = saved(frozen, given, frozen), saved(layer, given, layer)
    numbers = 8 * 4 * (ROWS + E + 2)  # where the rows of the experts lie, and seeds
    assert sum(after.values()) <= sum(before.values()) + ROWS * (H + I + 2 * R) * SIZE + numbers
    assert max(after.values()) < STACK / 4


def test_frozen_adapters_keep_neither_x_nor_h():
    frozen, layer, given = made("Qwen3Moe")
    for p in layer.parameters():
        p.requires_grad_(False)
    before, after = saved(frozen, given, frozen), saved(layer, given, layer)
    assert sum(after.values()) <= sum(before.values()) + 8 * 4 * (ROWS + E + 2)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_no_operator_of_a_step_makes_a_tensor_of_a_stacks_size(family):
    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.bytes, self.operators = 0, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)} | known
            self.operators += 1
            for t in out if isinstance(out, (list, tuple)) else (out,):
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                    self.bytes = max(self.bytes, t.untyped_storage().nbytes())
            return out

    _, layer, (x, ids, weights, dy) = made(family, 0.2)
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    x = x.requires_grad_()
    with Largest() as seen:
        layer(x, ids, weights).backward(dy)
    assert seen.operators > 10 and 0 < seen.bytes < STACK / 4


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_no_allocation_of_a_step_is_of_a_stacks_size(family):
    _, layer, (x, ids, weights, dy) = made(family, 0.2)
    x = x.requires_grad_()
    layer(x, ids, weights).backward(dy)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        layer(x, ids, weights).backward(dy)
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    largest = max(each.nbytes() for each in events)
    assert len(events) > 10 and ROWS * H * SIZE <= largest < STACK / 4
