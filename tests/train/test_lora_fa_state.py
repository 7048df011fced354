"""What `freeze_a` sets follows what happens to the model, can be undone, and is refused where it would be wrong."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.frozen_models import TIED, gradients, linear, of_x, random_adapters, tied_llama
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear, apply_lora, apply_reslora
from lora_kernels.models.pairs import pairs
from lora_kernels.train import freeze_a

peft = pytest.importorskip("peft")


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


def test_a_model_on_the_meta_device_is_projected_when_it_has_values() -> None:
    with torch.device("meta"):
        layer = FusedLoRALinear(5, 7, r=3, lora_alpha=6, dtype=torch.float64)
    frozen = freeze_a(layer)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    step = of_x(torch.randn(8, 5, dtype=torch.float64))
    got = gradients(layer, step)
    frozen.remove()
    a = layer.lora_A.detach()
    assert got.keys() == {"lora_B"}
    torch.testing.assert_close(got["lora_B"], gradients(layer, step)["lora_B"] @ torch.linalg.inv(a @ a.T) / 4)


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
    plain, rules = tied_llama(), TIED
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


def test_a_b_that_reads_sums_over_blocks_is_not_projected() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))
    apply_reslora(model, "ms", r=2)
    refused(model, r"B of 1.0 reads the sum of A x over several blocks .*project=False")
    assert len(freeze_a(model, project=False).known()) == 2


def test_tensors_of_a_functional_call_stay_as_they_are_and_are_refused_where_they_would_be_projected() -> None:
    model = nn.Sequential(linear())
    x = torch.randn(3, 5, dtype=torch.float64)
    frozen = freeze_a(model)
    given = {name: p.detach() for name, p in model.named_parameters()}
    given["0.lora_A"] = (given["0.lora_A"] * 2).requires_grad_()
    y = torch.func.functional_call(model, given, (x,))
    y.sum().backward()
    assert given["0.lora_A"].grad is not None and model[0].lora_A.grad is None
    given["0.lora_B"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"of 0 are replaced by tensors .*functional_call.*project=False"):
        torch.func.functional_call(model, given, (x,))
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(model, given, (x,)), y)
    frozen.remove()
    torch.func.functional_call(model, given, (x,)).sum().backward()
    assert given["0.lora_B"].grad is not None
