"""Gradients taken in other ways than ``loss.backward()`` are right, or refused where a back-end is named; they are
never zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from lora_kernels import FusedLoRALinear, reference
from lora_kernels.ops.group import Layer, lora_linear_group
from lora_kernels.quant import tables


def layer(kind: str) -> nn.Module:
    made = FusedLoRALinear.from_linear(
        nn.Linear(8, 6), r=2, quant="nf4" if kind == "nf4" else None, use_dora=kind == "dora"
    )
    nn.init.normal_(made.lora_B)
    return made


W, A, B = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)


def grouped(x):
    return sum(lora_linear_group(x, [Layer(W, A, B, 0.5), Layer(W, A, B, 2.0)]))


def equation(kind):
    """Return the function of x that `kind` computes, in plain torch."""
    if kind == "group":
        return lambda x: sum(reference.lora_linear(x, W, A, B, scale=s) for s in (0.5, 2.0))
    run = kind
    operands = {"lora_a": run.lora_A, "lora_b": run.lora_B, "scale": run.scaling, "bias": run.bias}
    if run.use_dora:
        return lambda x: reference.dora_linear(x, run.weight, magnitude=run.lora_magnitude_vector, **operands)
    weight = run.quantized_weight().dequantize() if hasattr(run, "quantized_weight") else run.weight
    return lambda x: reference.lora_linear(x, weight, **operands)


KINDS = ["dense", "dora", "nf4"]
TRANSFORMS = {
    "grad": lambda run, x: torch.func.grad(lambda x: run(x).square().sum())(x),
    "vjp": lambda run, x: torch.func.vjp(run, x)[1](torch.ones(3, 6)),
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (x,)),
    "jacrev": lambda run, x: torch.func.jacrev(run)(x),
    "jacfwd": lambda run, x: torch.func.jacfwd(run)(x),
    "hessian": lambda run, x: torch.func.hessian(lambda x: run(x).square().sum())(x),
    "vmap": lambda run, x: torch.func.vmap(run)(x),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", [*KINDS, "group"])
def test_a_transform_gives_the_derivative_of_the_equation(kind, transform, grad):
    run, x = (grouped if kind == "group" else layer(kind)), torch.randn(3, 8)
    want = TRANSFORMS[transform](equation(kind if kind == "group" else run), x)
    with torch.set_grad_enabled(grad):
        got = TRANSFORMS[transform](run, x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def per_sample(model, parameters, x, **how):
    def loss(parameters, x):
        return functional_call(model, parameters, (x[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0), **how)(parameters, x)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_sample_equal_those_of_single_samples(kind):
    run, x = layer(kind), torch.randn(5, 8)
    trained = {name: p for name, p in run.named_parameters() if p.requires_grad}
    got = per_sample(run, {name: p.detach() for name, p in trained.items()}, x)
    for i in range(5):
        single = torch.autograd.grad(run(x[i : i + 1]).square().sum(), list(trained.values()))
        for name, want in zip(trained, single, strict=True):
            torch.testing.assert_close(got[name][i], want, rtol=1e-4, atol=1e-5)


def test_a_frozen_weight_has_a_derivative_where_a_transform_asks_for_it():
    run, x = layer("dense"), torch.randn(5, 8)
    got = per_sample(run, {name: p.detach() for name, p in run.named_parameters()}, x)
    dy = 2 * run(x).detach()
    torch.testing.assert_close(got["weight"], dy[:, :, None] * x[:, None, :])
    torch.testing.assert_close(got["bias"], dy)


def test_dropout_under_vmap_is_torchs():
    run, x = layer("dense"), torch.ones(64, 8)
    run.lora_dropout = 0.5
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(run)(x)
    same, different = (torch.func.vmap(run, randomness=how)(x) for how in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


@pytest.mark.parametrize("kind", [*KINDS, "group"])
def test_forward_mode_gives_the_tangent(kind):
    run, x, t = (grouped if kind == "group" else layer(kind)), torch.randn(3, 8), torch.randn(3, 8)
    _, want = torch.func.jvp(equation(kind if kind == "group" else run), (x,), (t,))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            got = forward_ad.unpack_dual(run(forward_ad.make_dual(x, t)))
            torch.testing.assert_close(got.tangent, want)
            assert (
                run(x).grad_fn is None or "Function" in type(run(x).grad_fn).__name__
            )  # no tangent: a kernel serves it


def test_a_compiled_functional_gradient_is_right():
    run, x = layer("dense"), torch.randn(3, 8)
    want = torch.func.grad(lambda x: equation(run)(x).square().sum())(x)
    compiled = torch.compile(lambda x: torch.func.grad(lambda x: run(x).square().sum())(x), backend="eager")
    torch.testing.assert_close(compiled(x), want)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_named_backend_is_refused_in_a_transform_that_differentiates(kind, name):
    run, x = layer(kind), torch.randn(3, 8)
    run.backend = "cpu"
    with pytest.raises(RuntimeError, match=r"backend='cpu' does not go with torch\.func.*backend=None"):
        TRANSFORMS[name](run, x)
    with pytest.raises(RuntimeError, match="forward-mode AD"), forward_ad.dual_level():
        run(forward_ad.make_dual(x, x))
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(run)(x[None]), run(x)[None])
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="vmap under autocast"):
            torch.func.vmap(run)(x)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_a_transform_made_outlives_it(kind):
    """4-bit weights share a table. A tensor of a transform has no memory of its own."""
    tables._made.clear()
    run, x = layer(kind), torch.randn(3, 8)
    torch.func.vmap(torch.func.grad(lambda x: run(x).square().sum()))(x)
    torch.testing.assert_close(run(x), equation(run)(x))
    if kind == "nf4":
        run.backend = "eager"
        torch.testing.assert_close(run(x), equation(run)(x))


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
