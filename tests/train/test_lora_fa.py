"""`freeze_a` trains B alone, with the projected gradient, and the forward then keeps no x."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.kind_models import KIND_MODELS
from support.layer_kinds import KINDS
from torch import Tensor, nn

import lora_kernels
from lora_kernels import FusedLoRAEmbedding, FusedLoRALinear, apply_lora
from lora_kernels.models.pairs import EMBEDDING, pairs
from lora_kernels.train import freeze_a

peft = pytest.importorskip("peft")


def random_adapters(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for pair in pairs(model):
            pair.a.normal_()
            pair.b.normal_()
    return model


def linear(N: int = 7, K: int = 5, r: int = 3, **kwargs: Any) -> FusedLoRALinear:
    torch.manual_seed(0)
    dtype = kwargs.pop("dtype", torch.float64)
    return random_adapters(FusedLoRALinear.from_linear(nn.Linear(K, N, dtype=dtype), r=r, lora_alpha=6, **kwargs))


def gradients(model: nn.Module, step: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    step(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_x(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x).double().square().sum()


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


def test_the_scale_of_each_backward_counts() -> None:
    layer = linear()
    step = of_x(torch.randn(8, 5, dtype=torch.float64))
    freeze_a(layer)
    layer.scaling = 0.5
    a = layer.lora_A.detach()
    got = gradients(layer, step)["lora_B"]
    other = linear()
    other.scaling = 0.5
    plain = gradients(other, step)["lora_B"]
    torch.testing.assert_close(got, plain @ torch.linalg.inv(a @ a.T) / 0.25)
    layer.scaling = 0.0
    assert not gradients(layer, step)["lora_B"].count_nonzero()


def _load(layer: nn.Module, assign: bool) -> None:
    state = layer.state_dict()
    state["lora_A"] = torch.randn(3, 5, dtype=torch.float64)
    layer.load_state_dict(state, assign=assign)


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda layer: nn.init.normal_(layer.lora_A),
    "load_state_dict": lambda layer: _load(layer, False),
    "load_state_dict with assign": lambda layer: _load(layer, True),
    "reset_adapter": lambda layer: (layer.reset_adapter(), nn.init.normal_(layer.lora_B)),
    "another dtype": lambda layer: layer.float().double(),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_frozen_matrix_that_is_written_to_has_a_new_factor(write: str) -> None:
    layer = linear()
    step = of_x(torch.randn(8, 5, dtype=torch.float64))
    frozen = freeze_a(layer)
    gradients(layer, step)
    WRITES[write](layer)
    got = gradients(layer, step)
    frozen.remove()
    a = layer.lora_A.detach()
    want = gradients(layer, step)["lora_B"] @ torch.linalg.inv(a @ a.T) / 4
    assert got.keys() == {"lora_B"}
    torch.testing.assert_close(got["lora_B"], want, rtol=1e-7, atol=1e-7)


def test_a_write_between_forward_and_backward_is_seen_too() -> None:
    layer = linear(K=5)
    x = torch.randn(8, 5, dtype=torch.float64)
    freeze_a(layer)
    (layer(x) * 0).sum().backward()  # nothing depends on A's values but the factor
    layer.zero_grad()
    loss = (layer.lora_B * torch.arange(3.0, dtype=torch.float64)).sum()
    with torch.no_grad():
        layer.lora_A.normal_()
    loss.backward()
    a = layer.lora_A.detach()
    plain = torch.arange(3.0, dtype=torch.float64).expand(7, 3)
    torch.testing.assert_close(layer.lora_B.grad, plain @ torch.linalg.inv(a @ a.T) / 4)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_is_projected_by_itself(how: str) -> None:
    model = nn.Sequential(linear())
    step = of_x(torch.randn(8, 5, dtype=torch.float64))
    frozen = freeze_a(model)
    want = gradients(model, step)["0.lora_B"]
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    frozen.remove()
    assert not torch.allclose(gradients(model, step)["0.lora_B"], want)
    got = gradients(twin, step)
    assert got.keys() == {"0.lora_B"} and torch.equal(got["0.lora_B"], want)


def saved(run: Callable[[], Any]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return kept


def bytes_of_x(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
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


@pytest.mark.parametrize("layout", ["ours", "peft", "fused"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
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
    assert layout == "peft" or bytes_of_x(model, x)
    freeze_a(model)
    if layout == "peft" and dropout:
        return  # torch's dropout saves a mask of x's size
    assert bytes_of_x(model, x) == []
    assert any(t.shape == (64, 4) for t in saved(lambda: model(x)))  # h is


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_no_x_is_saved_over_a_quantised_base(quant: str) -> None:
    layer = linear(64, 128, 4, dtype=torch.float32, quant=quant)
    x = torch.randn(192, 128)
    assert bytes_of_x(layer, x)
    freeze_a(layer)
    assert bytes_of_x(layer, x) == []


def test_adapters_that_are_switched_off_and_on_stay_frozen() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(5, 7)), peft.LoraConfig(r=3, target_modules=["0"]))
    random_adapters(model)
    freeze_a(model)
    (pair,) = pairs(model)
    with model.disable_adapter():  # at its end PEFT makes every matrix of the adapter trainable
        model(torch.randn(2, 5))
    assert pair.a.requires_grad
    assert not any("lora_A" in name for name in gradients(model, of_x(torch.randn(2, 5))))
    assert not pair.a.requires_grad


def test_two_adapters_with_dora_and_a_bias_are_each_projected() -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(5, 7)), peft.LoraConfig(r=3, target_modules=["0"], use_dora=True)
    )
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], lora_bias=True))
    model = random_adapters(model).double()
    step = of_x(torch.randn(6, 5, dtype=torch.float64))
    for name in ("default", "second"):
        model.set_adapter(name)
        before = gradients(model, step)
        frozen = freeze_a(model, adapter=name)
        after = gradients(model, step)
        (pair,) = pairs(model, name)
        key = f"base_model.model.0.lora_B.{name}.weight"
        a = pair.a.detach()
        torch.testing.assert_close(after[key], before[key] @ torch.linalg.inv(a @ a.T) / pair.scale**2)
        assert before.keys() - after.keys() == {f"base_model.model.0.lora_A.{name}.weight"}
        frozen.remove()


def test_a_stale_gradient_of_a_does_not_move_it() -> None:
    layer = linear()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    of_x(torch.randn(8, 5, dtype=torch.float64))(layer).backward()
    freeze_a(layer)
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    optimizer.step()
    assert torch.equal(layer.lora_A, a) and not torch.equal(layer.lora_B, b)


def test_without_the_projection_b_has_its_own_gradient() -> None:
    layer = linear()
    step = of_x(torch.randn(8, 5, dtype=torch.float64))
    before = gradients(layer, step)
    frozen = freeze_a(layer, project=False)
    assert gradients(layer, step).keys() == {"lora_B"}
    assert torch.equal(gradients(layer, step)["lora_B"], before["lora_B"])
    frozen.remove()
    assert layer.lora_A.requires_grad and not layer._forward_pre_hooks and not layer.lora_B._backward_hooks


def refused(model: nn.Module, text: str, error: type[Exception] = ValueError, **kwargs: Any) -> None:
    """Assert that `freeze_a` raises, and changes nothing."""
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(error, match=text):
        freeze_a(model, **kwargs)
    assert trained == {name: p.requires_grad for name, p in model.named_parameters()}
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]


def test_what_cannot_be_projected_is_refused_and_nothing_is_changed() -> None:
    good, zero, wide, off = linear(), linear(), linear(r=6), linear()
    with torch.no_grad():
        zero.lora_A.zero_()
    off.scaling = 0.0
    refused(nn.Sequential(good, zero), r"A \(3, 5\) of 1 has a numerical rank of 0, and r is 3")
    refused(wide, r"A \(6, 5\) of  has a numerical rank of 5, and r is 6")
    refused(nn.Sequential(good, off), r"s is 0 in 1")
    refused(nn.Linear(2, 2), "no A or B of this model is trained")
    frozen_b = linear()
    frozen_b.lora_B.requires_grad_(False)
    refused(nn.Sequential(good, frozen_b), "B is frozen in 1")
    one, other = linear(7, 7), linear(7, 7)
    other.lora_B = one.lora_B
    refused(nn.Sequential(one, other), "0, 1 share one trained matrix")
    for layer in (zero, wide):
        freeze_a(layer, project=False)
    freeze_a(good)
    refused(nn.Sequential(good), "A is frozen already in 0", RuntimeError)


def test_a_tied_head_is_one_update_of_ours_and_refused_with_pefts_copies() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    plain = transformers.LlamaForCausalLM(config)
    rules = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}
    ours, theirs = copy.deepcopy(plain), peft.get_peft_model(plain, peft.LoraConfig(**rules))
    apply_lora(ours, r=4, **rules)
    random_adapters(ours.double())

    def step(model: nn.Module) -> Tensor:
        return model(torch.arange(6)[None]).logits.square().sum()

    before = gradients(ours, step)
    freeze_a(ours)
    after = gradients(ours, step)
    embedding = pairs(ours)[0]
    b = embedding.b.detach()
    want = before["model.embed_tokens.lora_embedding_A"] @ torch.linalg.inv(b.T @ b) / embedding.scale**2
    torch.testing.assert_close(after["model.embed_tokens.lora_embedding_A"], want)
    refused(theirs, "lm_head.lora_A.default.weight lies in the memory of an adapter that is to be frozen")
