"""`apply_vera` and `apply_tied_lora` put layers with shared factors into a model, or change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import adapter_parameters, apply_tied_lora, apply_vera, merge_and_unload
from lora_kernels.models.pairs import pairs
from lora_kernels.models.shared import shared_layers
from lora_kernels.nn.quantized import QuantizedLoRALinear
from lora_kernels.nn.shared import SharedLoRALinear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.up, self.norm, self.down = nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 7, bias=False)

    def forward(self, ids):
        return self.down(self.norm(torch.tanh(self.up(self.embed(ids)))))


IDS = torch.tensor([[1, 2, 3], [4, 10, 0]])


def started(model):
    """Return whether the model computes what the plain one does."""
    torch.manual_seed(0)
    torch.testing.assert_close(model(IDS), Net()(IDS))


def net():
    torch.manual_seed(0)
    return Net()


def test_vera_trains_the_vectors_alone_and_starts_at_the_plain_model():
    model = net()
    report = apply_vera(model, r=8, d_initial=0.3)
    told = [(layer.name, layer.r, layer.size) for layer in report.layers]
    assert told == [("up", 8, "12 → 20"), ("down", 8, "20 → 7")] and "down       8" in str(report)
    started(model)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"up.lora_u": (8,), "up.lora_v": (20,), "down.lora_u": (8,), "down.lora_v": (7,)}
    assert tuple(model.lora_shared.lora_A.shape) == (8, 20) and tuple(model.lora_shared.lora_B.shape) == (20, 8)
    assert model.up.scaling == model.down.scaling == 1.0 and float(model.up.lora_u[0]) == pytest.approx(0.3)
    assert lora_kernels.trainable_parameters(model).trainable == 8 + 20 + 8 + 7
    model(IDS).square().sum().backward()
    assert model.down.lora_v.grad.any() and model.up.lora_v.grad.any()


def test_vera_is_the_same_whatever_the_global_generator_holds():
    one, other = net(), net()
    apply_vera(one, r=8, projection_prng_key=9)
    torch.manual_seed(1234)
    apply_vera(other, r=8, projection_prng_key=9)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


FLAGS = [(a, b, u, v) for a in (0, 1) for b in (0, 1) for u in (0, 1) for v in (0, 1) if a or b or u or v]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_variant_of_tied_lora_starts_at_the_plain_model_and_can_leave_it(flags):
    model = net()
    a, b, u, v = map(bool, flags)
    apply_tied_lora(model, r=4, lora_alpha=6, train_a=a, train_b=b, train_u=u, train_v=v)
    started(model)
    shared = model.lora_shared
    assert (shared.lora_A.requires_grad, shared.lora_B.requires_grad) == (a, b)
    assert (model.up.lora_u.requires_grad, model.down.lora_v.requires_grad) == (u, v)
    model(IDS).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads and all("lora_" in name for name in grads)
    assert any(g.any() for g in grads.values())


def test_shared_matrices_count_and_yield_once():
    model = net()
    apply_tied_lora(model, r=4)
    adapters = list(adapter_parameters(model))
    assert len(adapters) == 6 and len({id(p) for p in adapters}) == 6
    lora_kernels.mark_only_lora_as_trainable(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    assert pairs(model) == []


def test_merging_and_unloading_leaves_the_plain_model():
    model = net()
    apply_tied_lora(model, r=4)
    with torch.no_grad():
        for p in adapter_parameters(model):
            p.normal_()
    want = model(IDS)
    names = [name for name, _ in Net().named_parameters()]
    assert merge_and_unload(model) is model and [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(IDS), want, rtol=1e-4, atol=1e-4)


def test_a_sequential_holds_the_factors_in_its_first_adapted_layer():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    apply_vera(model, r=4)
    assert len(model) == 3 and model[0].factors is model[2].factors is model[0].lora_shared
    assert sum("lora_shared" in name for name in model.state_dict()) == 2
    assert len(list(adapter_parameters(model))) == 6
    x = torch.randn(2, 6)
    want = model(x)
    merge_and_unload(model)
    torch.testing.assert_close(model(x), want)
    assert not any("lora" in name for name in model.state_dict())


def test_vera_over_quantised_weights_reports_their_bytes():
    model = net()
    report = apply_vera(model, r=8, quant="int8")
    assert all(isinstance(layer, QuantizedLoRALinear) for layer in shared_layers(model).values())
    assert report.quantised is not None and "int8" in str(report)
    model(IDS).sum().backward()


def test_16_bit_weights_have_fp32_factors_unless_asked():
    model = net().bfloat16()
    apply_vera(model, r=8)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert model(IDS).dtype == torch.bfloat16
    model = net().bfloat16()
    apply_vera(model, r=8, adapter_dtype=torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.bfloat16}


def test_verify_finds_a_layer_that_is_passed_over():
    class Reads(Net):
        def forward(self, ids):
            return nn.functional.linear(self.norm(self.up(self.embed(ids))), getattr(self, "down").weight)  # noqa: B009

    model = Reads()
    with pytest.warns(UserWarning, match="these adapters take no part in the forward.*down") as told:
        report = apply_vera(model, r=4, verify=IDS)
    assert told[0].filename == __file__
    assert list(report.without_effect) == ["down"]
    model = net()
    assert not apply_vera(model, r=4, verify=IDS).without_effect


def test_training_lowers_the_loss_and_moves_only_the_adapters():
    model = net()
    apply_tied_lora(model, r=4)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten() % 7)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved and all("lora_" in name for name in moved)


class Named(Net):
    def __init__(self):
        super().__init__()
        self.lora_shared = nn.Identity()


@pytest.mark.parametrize(("make", "apply", "error", "match"), [
    (Net, lambda m: apply_vera(m, target_modules=["embed", "up"]), ValueError, "of class Embedding, and shared"),
    (Net, lambda m: apply_vera(m, target_modules=["nothing"]), ValueError, "match no layer to replace"),
    (Net, lambda m: apply_vera(m, r=0), ValueError, "r must be an integer of at least 1, got 0"),
    (Net, lambda m: apply_vera(m, projection_prng_key=-1), ValueError, "key must be an integer"),
    (Net, lambda m: apply_vera(m, d_initial=float("nan")), ValueError, "u .d_initial of VeRA. must be a finite number"),
    (Net, lambda m: apply_vera(m, vera_dropout=1.0), ValueError, "lora_dropout must lie in"),
    (Net, lambda m: apply_vera(m, backend="nope"), ValueError, "nope"),
    (Net, lambda m: apply_vera(m, verify=torch.tensor([99])), IndexError, "out of range"),
    (Net, lambda m: apply_vera(m, adapter_dtype=torch.float16), TypeError, "adapter_dtype"),
    (Net, lambda m: apply_tied_lora(m, train_a=False, train_b=False, train_u=False, train_v=False), ValueError,
     "are all False: nothing would be trained"),
    (Named, lambda m: apply_vera(m), ValueError, "an attribute 'lora_shared' already"),
])  # fmt: skip
def test_what_is_refused_leaves_the_model_unchanged(make, apply, error, match):
    model = make()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    modules = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=match):
        apply(model)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert [(name, id(module)) for name, module in model.named_modules()] == modules


def test_a_model_with_adapters_is_refused():
    model = net()
    apply_vera(model, r=4)
    for again in (apply_vera, apply_tied_lora, lora_kernels.apply_lora):
        with pytest.raises(ValueError, match="has layers with adapters already"):
            again(model)
    assert isinstance(model.up, SharedLoRALinear)


def test_layers_of_two_dtypes_cannot_share_their_factors():
    model = net()
    model.down.double()
    with pytest.raises(ValueError, match=r"cannot be shared.*torch.float32.*torch.float64"):
        apply_vera(model, r=4)


@pytest.mark.parametrize("apply", [apply_vera, apply_tied_lora])
def test_what_is_made_in_inference_mode_can_be_trained(apply):
    model = net()
    with torch.inference_mode():
        apply(model, r=2)
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
