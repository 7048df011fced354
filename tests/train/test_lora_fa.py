"""`freeze_a` trains B alone, with the projected gradient, and the forward then keeps no x."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.frozen_models import gradients, linear, of_x, random_adapters
from support.kind_models import KIND_MODELS
from support.layer_kinds import KINDS
from torch import Tensor, nn

import lora_kernels
from lora_kernels import FusedLoRAEmbedding, apply_lora
from lora_kernels.models.pairs import EMBEDDING, pairs
from lora_kernels.train import freeze_a

peft = pytest.importorskip("peft")


def test_the_gradient_of_b_is_the_closed_form() -> None:
    layer = linear()
    x, dy = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    freeze_a(layer)
    layer(x).backward(dy)
    a, s = layer.lora_A.detach(), 2.0
    plain = s * dy.T @ x @ a.T
    torch.testing.assert_close(layer.lora_B.grad, plain @ torch.linalg.inv(a @ a.T) / s**2, rtol=1e-11, atol=1e-11)
    assert layer.lora_A.grad is None and not layer.lora_A.requires_grad


def test_the_step_in_the_weight_is_the_nearest_to_the_whole_gradient() -> None:
    layer = linear()
    x, dy = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    freeze_a(layer)
    layer(x).backward(dy)
    g, a, s = dy.T @ x, layer.lora_A.detach(), 2.0
    nearest = torch.linalg.lstsq(s * a.T, g.T).solution.T  # argmin over ĝ of ‖s·ĝ A − G‖
    torch.testing.assert_close(layer.lora_B.grad, nearest, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["ours", "peft", "fused"])
def test_an_embedding_freezes_b_and_trains_a(layout: str) -> None:
    table = nn.Embedding(11, 6, dtype=torch.float64)
    ids, dy = torch.randint(11, (13,)), torch.randn(13, 6, dtype=torch.float64)
    model: Any = nn.Sequential(table)
    if layout == "ours":
        model = nn.Sequential(FusedLoRAEmbedding.from_embedding(table, r=3, lora_alpha=6))
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])).double()
        if layout == "fused":
            lora_kernels.fuse(model)
    (pair,) = pairs(random_adapters(model))
    freeze_a(model)
    model(ids).backward(dy)
    g = torch.zeros(11, 6, dtype=torch.float64).index_add_(0, ids, dy)  # that of ΔE = s·Aᵀ Bᵀ
    b, s = pair.b.detach(), 2.0
    want = torch.linalg.lstsq(s * b, g.T).solution  # argmin over ĝ of ‖s·B ĝ − Gᵀ‖
    torch.testing.assert_close(pair.as_a(pair.a.grad)[0], want, rtol=1e-10, atol=1e-10)
    assert pair.a.requires_grad and not pair.b.requires_grad and pair.b.grad is None


@pytest.mark.parametrize("layout", ["ours", "peft", "fused"])
@pytest.mark.parametrize("kind", KIND_MODELS)
def test_every_kind_of_layer_has_the_projection_of_its_own_gradients(kind: str, layout: str) -> None:
    case = KIND_MODELS[kind]
    dtype = torch.float32 if layout == "peft" and "experts" in kind else torch.float64  # torch's grouped_mm has no fp64
    model: nn.Module = case.plain().to(dtype)
    if layout == "ours":
        apply_lora(model, **({"r": 2, "lora_alpha": 5} | dict(case.rules)))
    else:
        rules = {"target_modules": []} | dict(case.rules) | dict(case.peft)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=5, **rules)).to(dtype)
        if layout == "fused":
            lora_kernels.fuse(model)
    case = copy.copy(case)
    if kind in ("convolution", "attention"):
        object.__setattr__(case, "inputs", lambda g, made=case.inputs: made(g).double())
    random_adapters(model)
    found = pairs(model)
    before = gradients(model, lambda m: case.run(m).square().sum())
    names = {id(p): name for name, p in model.named_parameters()}
    frozen = freeze_a(model)
    after = gradients(model, lambda m: case.run(m).square().sum())
    assert set(after) == set(before) - {names[id(pair.random_at_start)] for pair in found}
    for pair in found:
        name = names[id(pair.zero_at_start)]
        if pair.kind == EMBEDDING:
            f = pair.as_b(pair.b.detach()).mT
            want, got = (pair.as_a(grads[name]).double().mT for grads in (before, after))
        else:
            f = pair.as_a(pair.a.detach())
            want, got = (pair.as_b(grads[name]).double() for grads in (before, after))
        want = want @ torch.linalg.inv(f.double() @ f.double().mT) / pair.scale**2
        tolerance = 1e-9 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())
    frozen.remove()
    again = gradients(model, lambda m: case.run(m).square().sum())
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_and_dora_layers_have_the_projection_of_their_own_gradients(kind: str) -> None:
    layer = linear(32, 64, 4, dtype=torch.float32, **KINDS[kind])
    step = of_x(torch.randn(9, 64))
    before = gradients(layer, step)
    freeze_a(layer)
    after = gradients(layer, step)
    a = layer.lora_A.detach().double()
    want = (before["lora_B"].double() @ torch.linalg.inv(a @ a.T) / layer.scaling**2).float()
    torch.testing.assert_close(after["lora_B"], want, rtol=1e-6, atol=1e-6 * want.abs().max().item())
    assert after.keys() == before.keys() - {"lora_A"}
    if kind == "dora":
        assert torch.equal(after["lora_magnitude_vector"], before["lora_magnitude_vector"])


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_in_fp32_beside_16_bits_are_projected_in_fp64_and_rounded_once(autocast: bool) -> None:
    layer = linear(33, 65, 5, dtype=torch.float32 if autocast else torch.bfloat16)
    assert layer.lora_B.dtype == torch.float32
    x = torch.randn(9, 65).to(layer.weight.dtype)

    def step(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
            loss = y.float().square().sum()
            if autocast:
                loss.backward()  # a backward inside of the context
            return loss.detach().requires_grad_() if autocast else loss

    before = gradients(layer, step)["lora_B"].double()
    freeze_a(layer)
    a = layer.lora_A.detach().double()
    want = (before @ torch.linalg.inv(a @ a.T) / layer.scaling**2).float()
    torch.testing.assert_close(gradients(layer, step)["lora_B"], want, rtol=2**-22, atol=2**-22 * want.abs().max())


def test_accumulated_gradients_are_projected_once_each() -> None:
    layer = linear()
    x = torch.randn(8, 5, dtype=torch.float64)
    freeze_a(layer)
    whole = gradients(layer, of_x(x))["lora_B"]
    layer.zero_grad()
    for part in x.chunk(4):
        of_x(part)(layer).backward()
    torch.testing.assert_close(layer.lora_B.grad, whole)


def test_scaled_gradients_are_unscaled_to_the_projection() -> None:
    layer = linear(dtype=torch.float32)
    freeze_a(layer)
    step = of_x(torch.randn(8, 5))
    want = gradients(layer, step)["lora_B"]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD([layer.lora_B], lr=1.0)
    layer.zero_grad()
    scaler.scale(step(layer)).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(layer.lora_B.grad, want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradient(reentrant: bool) -> None:
    layer = linear(lora_dropout=0.3)
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    freeze_a(layer)
    want = gradients(layer, of_x(x))["lora_B"]

    def checkpointed(model: nn.Module) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().sum()

    assert torch.equal(gradients(layer, checkpointed)["lora_B"], want)


def saved(run: Callable[[], Any]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return kept


def as_large_as_x(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors of x's size that a forward saves."""
    return [tuple(t.shape) for t in saved(lambda: model(x)) if t.numel() >= x.numel() and not is_weight(model, t)]


def is_weight(model: nn.Module, t: Tensor) -> bool:
    return any(torch._C._is_alias_of(t, p) for p in model.parameters())


class Group(nn.Module):
    """Three layers over one x."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(48, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)


@pytest.mark.parametrize(
    ("layout", "dropout"),
    [("ours", 0.0), ("ours", 0.1), ("fused", 0.0), ("fused", 0.1), ("peft", 0.0)],  # torch's dropout saves a mask
)
def test_no_x_is_saved_for_the_backward(layout: str, dropout: float) -> None:
    rules: dict[str, Any] = {"r": 4, "lora_dropout": dropout, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    model: nn.Module = Group()
    if layout == "ours":
        apply_lora(model, **rules)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(**rules))
        if layout == "fused":
            lora_kernels.fuse(model)
    random_adapters(model.train())
    x = torch.randn(64, 48, requires_grad=True)
    assert as_large_as_x(model, x)
    freeze_a(model)
    assert as_large_as_x(model, x) == []
    assert any(t.shape == (64, 4) for t in saved(lambda: model(x)))  # h is


def test_dora_saves_its_direction_and_no_x() -> None:
    layer = linear(40, 48, 4, dtype=torch.float32, use_dora=True)
    x = torch.randn(64, 48)
    freeze_a(layer)
    shapes = [tuple(t.shape) for t in saved(lambda: layer(x))]
    assert (64, 48) not in shapes and (64, 40) in shapes  # m's gradient needs the rows of (W + s·B A) x


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_no_x_is_saved_over_a_quantised_base(quant: str) -> None:
    layer = linear(64, 128, 4, dtype=torch.float32, quant=quant)
    x = torch.randn(192, 128)
    assert as_large_as_x(layer, x)
    freeze_a(layer)
    assert as_large_as_x(layer, x) == []
