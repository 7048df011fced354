"""Gradients taken in other ways than ``loss.backward()`` are right, or refused with a way out; they are never zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from lora_kernels import FusedLoRALinear
from lora_kernels.ops.group import Layer, lora_linear_group


def layer(kind: str) -> nn.Module:
    made = FusedLoRALinear.from_linear(
        nn.Linear(8, 6), r=2, quant="nf4" if kind == "nf4" else None, use_dora=kind == "dora"
    )
    nn.init.normal_(made.lora_B)
    return made


W, A, B = torch.ones(6, 8), torch.ones(2, 8), torch.ones(6, 2)


def grouped(x):
    return sum(lora_linear_group(x, [Layer(W, A, B, 0.5), Layer(W, A, B, 2.0)]))


KINDS = ["dense", "dora", "nf4"]
TRANSFORMS = {
    "grad": lambda run, x: torch.func.grad(lambda x: run(x).sum())(x),
    "vjp": lambda run, x: torch.func.vjp(run, x),
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (x,)),
    "jacrev": lambda run, x: torch.func.jacrev(run)(x),
    "jacfwd": lambda run, x: torch.func.jacfwd(run)(x),
    "vmap with gradients": lambda run, x: torch.func.vmap(run)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", [*KINDS, "group"])
def test_a_transform_that_differentiates_is_refused(kind, transform):
    with pytest.raises(RuntimeError, match=r"(?s)does not go with torch\.func.*Take loss\.backward"):
        TRANSFORMS[transform](grouped if kind == "group" else layer(kind), torch.randn(3, 8))


@pytest.mark.parametrize("kind", [*KINDS, "group"])
def test_forward_mode_is_refused_without_gradients_too(kind):
    run, x = (grouped if kind == "group" else layer(kind)), torch.randn(3, 8)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="does not go with"):
            torch.func.jvp(run, (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            run(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("trained", [True, False])
def test_a_compiled_functional_gradient_is_refused_and_not_zero(trained):
    run, x = layer("dense"), torch.randn(3, 8)
    run.requires_grad_(trained)
    run.weight.requires_grad_(False)
    compiled = torch.compile(lambda x: torch.func.grad(lambda x: run(x).sum())(x), backend="eager")
    with pytest.raises(Exception, match="does not go with"):
        compiled(x)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_without_gradients_is_served(kind):
    run, x = layer(kind), torch.randn(4, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(run)(x), run(x))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_several_gradients_at_once_equal_single_ones(kind, backend):
    run, x, dys = layer(kind), torch.randn(3, 8, requires_grad=True), torch.randn(4, 3, 6)
    run.backend = backend
    wanted = [x, *(p for p in run.parameters() if p.requires_grad)]
    y = run(x)
    batched = torch.autograd.grad(y, wanted, dys, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, wanted, dy, retain_graph=True) for dy in dys]
    for got, want in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))
    vectorised, plain = (torch.autograd.functional.jacobian(run, x, vectorize=v) for v in (True, False))
    torch.testing.assert_close(vectorised, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_dy_of_zeros_without_memory_is_served(kind, p):
    """The gradient of torch.sgn is a tensor of zeros without memory: its address is 0."""
    run, x = layer(kind), torch.randn(3, 8, requires_grad=True)
    run.lora_dropout = p
    y = run(x)
    (dy,) = torch.autograd.grad(torch.sgn(y).sum(), y, retain_graph=True)
    assert dy._is_zerotensor() and dy.data_ptr() == 0
    torch.sgn(y).sum().backward()
    assert x.grad.count_nonzero() == 0 and run.lora_A.grad.count_nonzero() == 0


def test_an_x_of_zeros_without_memory_is_served():
    run, x = layer("dense"), torch._efficientzerotensor((3, 8))
    run(x).sum().backward()
    assert run.lora_A.grad.count_nonzero() == 0
    torch.testing.assert_close(run(x), F.linear(torch.zeros(3, 8), run.weight, run.bias))
