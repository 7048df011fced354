"""torch's FLOP counter counts the products of fused layers, as many as it counts for PEFT's layers."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels
from lora_kernels import apply_lora, lora_linear
from lora_kernels.ops.group import Layer, lora_linear_group
from lora_kernels.testing.judge import problem

M, K, N, R = 32, 64, 128, 8


def two_linears() -> nn.Module:
    return nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))


def of_peft(fused: bool, **settings) -> nn.Module:
    config = peft.LoraConfig(r=R, target_modules=["0", "2"], **settings)
    model = peft.get_peft_model(two_linears(), config)
    if fused:
        assert lora_kernels.fuse(model).fused
    return model


def ours(**settings) -> nn.Module:
    model = two_linears()
    apply_lora(model, r=R, target_modules=["0", "2"], **settings)
    return model


MODELS = {
    "fuse": lambda: of_peft(True),
    "fuse, dropout": lambda: of_peft(True, lora_dropout=0.1),
    "apply_lora": ours,
    "nf4": lambda: ours(quant="nf4"),
    "int8": lambda: ours(quant="int8"),
    "fp8": lambda: ours(quant="fp8"),
}


def flops(run, *args) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run(*args)
    return counter.get_total_flops()


def train(model: nn.Module, need_dx: bool = True) -> None:
    model(torch.randn(M, K, requires_grad=need_dx)).sum().backward()


STEPS = {
    "forward": lambda model: model(torch.randn(M, K)),
    "forward without gradients": lambda model: torch.no_grad()(model)(torch.randn(M, K)),
    "training": train,
    "training, no dx": lambda model: train(model, need_dx=False),
    "reentrant checkpoint": lambda model: (
        checkpoint(model, torch.randn(M, K, requires_grad=True), use_reentrant=True).sum().backward()
    ),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_counter_counts_what_it_counts_for_peft(kind, step):
    want = flops(STEPS[step], of_peft(False))
    assert want > 0 and flops(STEPS[step], MODELS[kind]()) == want


def test_the_recomputation_of_a_checkpoint_is_counted():
    """torch stops a recomputation at the last tensor that was saved, which spares PEFT its last product."""

    def run(model):
        checkpoint(model, torch.randn(M, K, requires_grad=True), use_reentrant=False).sum().backward()

    last = 2 * M * R * K
    assert flops(run, of_peft(True)) == flops(run, of_peft(False)) + last


def test_adapters_that_want_no_gradient_are_not_counted():
    def run(model, freeze):
        for name, parameter in model.named_parameters():
            if freeze in name:
                parameter.requires_grad_(False)
        train(model)

    for freeze in ("lora_A", "lora_B"):
        assert flops(run, of_peft(True), freeze) == flops(run, of_peft(False), freeze)


def test_dora_is_counted_with_its_norm():
    model = ours(use_dora=True)
    plain = 2 * 2 * M * (K * N + R * (K + N))
    norm = sum(2 * n * k * R + 2 * R * R * (n + k) for n, k in ((N, K), (K, N)))
    assert flops(model, torch.randn(M, K)) == plain + norm
    # With dropout the base is multiplied a second time, in each direction; PEFT does so too.
    model = ours(use_dora=True, lora_dropout=0.5)
    assert flops(model, torch.randn(M, K)) == plain + norm + 2 * 2 * M * K * N


def test_a_group_counts_as_its_layers_do():
    q = problem(M, N, K, R)
    a, b, x = q.a.requires_grad_(), q.b.requires_grad_(), q.x.requires_grad_()

    def together():
        first, second = lora_linear_group(x, [Layer(q.w, a, b, 0.5), Layer(q.w, a, b, 2.0)])
        (first + second).sum().backward()

    def apart():
        (lora_linear(x, q.w, a, b, scale=0.5) + lora_linear(x, q.w, a, b, scale=2.0)).sum().backward()

    assert flops(together) == flops(apart) > 0


def test_counts_are_listed_by_module():
    counter = FlopCounterMode(display=False)
    with counter:
        train(ours())
    counts = counter.get_flop_counts()
    forward = 2 * M * (K * N + R * (K + N))
    for name in ("Sequential.0", "Sequential.2"):
        assert counts[name][torch.ops.lora_kernels.forward] == forward
        assert counts[name][torch.ops.lora_kernels.backward] > forward
    assert sum(counts["Sequential"].values()) == counter.get_total_flops()


def test_a_formula_of_the_user_is_kept():
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.lora_kernels.forward: lambda *_, **__: 7})
    with counter, torch.no_grad():
        ours()(torch.randn(M, K))
    assert counter.get_total_flops() == 14
