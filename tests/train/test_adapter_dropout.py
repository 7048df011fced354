"""`adapter_dropout` drops whole adapters, for samples and segments, and what is dropped is the base bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels import apply_lora, mixed
from lora_kernels.models.pairs import pairs
from lora_kernels.train import adapter_dropout

peft = pytest.importorskip("peft")

B, S = 8, 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def models(layout: str, adapters: tuple[str, ...] = ("default",)) -> tuple[nn.Module, nn.Module]:
    """Return a plain model, and one over the same weights whose adapters are not zero."""
    torch.manual_seed(0)
    plain = Net()
    model: Any = copy.deepcopy(plain)
    rules: dict[str, Any] = {"r": 4, "target_modules": ["up", "down"], "lora_dropout": 0.2}
    if layout == "ours":
        apply_lora(model, **rules)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(**rules), adapter_name=adapters[0])
        for name in adapters[1:]:
            model.add_adapter(name, peft.LoraConfig(**rules))
        model.base_model.set_adapter(list(adapters))
        lora_kernels.fuse(model, strict=True)
    with torch.no_grad():
        for pair in pairs(model):
            pair.b.normal_()
    return plain, model.train()


def test_the_share_of_dropped_samples_is_p() -> None:
    ids = torch.zeros(20_000, dtype=torch.int32)
    dropped = adapter_dropout(ids, 0.3)
    assert dropped.dtype == torch.int32 and set(dropped.unique().tolist()) == {-1, 0}
    assert abs((dropped < 0).double().mean().item() - 0.3) < 4 * (0.3 * 0.7 / 20_000) ** 0.5
    assert torch.equal(ids, torch.zeros_like(ids))


def test_all_tokens_of_an_adapter_in_a_sample_are_dropped_together_and_independently_of_others() -> None:
    ids = torch.tensor([-1, 0, 0, 1, 1, 1]).repeat(4_000, 1)
    dropped = adapter_dropout(ids, 0.5)
    zero, one = dropped[:, 1:3], dropped[:, 3:]
    assert (zero == zero[:, :1]).all() and (one == one[:, :1]).all() and (dropped[:, 0] == -1).all()
    gone = torch.stack([zero[:, 0] < 0, one[:, 0] < 0]).double()
    assert abs(torch.corrcoef(gone)[0, 1].item()) < 4 / 4_000**0.5
    assert gone.mean(1).sub(0.5).abs().max() < 4 * 0.5 / 4_000**0.5


def test_segments_of_a_packed_sequence_are_dropped_one_by_one() -> None:
    segments = torch.arange(3_000).repeat_interleave(2)[None]
    dropped = adapter_dropout(torch.zeros_like(segments), 0.5, segments=segments).view(-1, 2)
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert abs((dropped[:, 0] < 0).double().mean().item() - 0.5) < 4 * 0.5 / 3_000**0.5


def test_each_adapter_can_have_a_probability_of_its_own() -> None:
    ids = torch.tensor([0, 1, 2, -1]).repeat(50, 1)
    dropped = adapter_dropout(ids, {0: 1.0, 2: 0.0})
    assert torch.equal(dropped, torch.tensor([-1, 1, 2, -1]).repeat(50, 1))
    names = ["audio", "image", None, "__base__"]
    assert adapter_dropout(names, {"audio": 1.0, "video": 0.5}) == [None, "image", None, None]


def test_no_probability_changes_nothing_and_one_drops_all() -> None:
    ids = torch.randint(-1, 3, (B, S))
    assert torch.equal(adapter_dropout(ids, 0.0), ids)
    assert torch.equal(adapter_dropout(ids, 1.0), torch.full_like(ids, -1))
    assert adapter_dropout([0, -1, 2], 0.0) == [0, -1, 2]
    assert adapter_dropout(torch.empty(0, dtype=torch.int64), 0.5).shape == (0,)


def test_the_same_seed_drops_the_same() -> None:
    ids = torch.zeros(B, S, dtype=torch.int64)
    torch.manual_seed(3)
    one = adapter_dropout(ids, 0.5)
    torch.manual_seed(3)
    assert torch.equal(adapter_dropout(ids, 0.5), one)
    own = [adapter_dropout(ids, 0.5, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(own[0], own[1]) and torch.equal(own[0], one)
    torch.manual_seed(3)
    assert adapter_dropout(["a"] * B, 0.5) == [None if i < 0 else "a" for i in one[:, 0].tolist()]


@pytest.mark.parametrize("layout", ["ours", "fused"])
def test_a_dropped_sample_is_the_base_bit_for_bit_and_gives_the_adapter_no_gradient(layout: str) -> None:
    plain, model = models(layout)
    x = torch.randn(B, S, 16)
    ids = adapter_dropout([0] * B, 0.5)
    gone = torch.tensor(ids) < 0
    assert gone.any() and not gone.all()
    with mixed(model, ids):
        y = model(x)
        y[gone].square().sum().backward()
    assert torch.equal(y[gone], plain(x)[gone]) and not torch.equal(y[~gone], plain(x)[~gone])
    assert all(p.grad is None or not p.grad.count_nonzero() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("layout", ["ours", "fused"])
def test_a_step_that_drops_every_sample_has_a_backward_without_gradients(layout: str) -> None:
    plain, model = models(layout)
    x = torch.randn(B, S, 16)
    with mixed(model, adapter_dropout([0] * B, 1.0)):
        y = model(x)
        y.square().sum().backward()
    assert torch.equal(y, plain(x))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("layout", ["ours", "fused"])
def test_the_gradients_are_those_of_the_samples_that_are_left(layout: str) -> None:
    model = models(layout)[1].double()
    x = torch.randn(B, S, 16, dtype=torch.float64)
    ids = torch.tensor([0, -1] * (B // 2))
    found = []
    for part, own in ((x, ids), (x[::2], ids[::2])):
        torch.manual_seed(1)  # the mask of a row follows from its place among the rows of the adapter
        model.zero_grad(set_to_none=True)
        with mixed(model, own):
            model(part).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 4
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("layout", ["ours", "fused"])
def test_the_tokens_of_a_dropped_segment_are_the_base_bit_for_bit(layout: str) -> None:
    plain, model = models(layout)
    x = torch.randn(B, S, 16)
    audio = torch.tensor([0, 0, 1, 1, 1, 0]).bool().expand(B, S)
    ids = adapter_dropout(torch.where(audio, 0, -1), 0.5)
    kept = ids == 0
    assert kept.any() and (kept[audio] == 0).any() and not kept[~audio].any()
    with mixed(model, ids), torch.no_grad():
        y = model(x)
    assert torch.equal(y[~kept], plain(x)[~kept])
    assert (y[kept] != plain(x)[kept]).any(-1).all()


def test_two_modalities_have_adapters_of_their_own() -> None:
    _, model = models("fused", ("audio", "image"))
    _, alone = models("fused", ("audio", "image"))
    x = torch.randn(B, S, 16)
    names = adapter_dropout(["audio", "image"] * (B // 2), {"image": 0.5})
    assert names[::2] == ["audio"] * (B // 2) and None in names
    with mixed(model.eval(), names), torch.no_grad():
        y = model(x)
    for name in ("audio", "image"):
        alone.base_model.set_adapter(name)
        own = [j for j, each in enumerate(names) if each == name]
        torch.testing.assert_close(y[own], alone.eval()(x)[own])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_what_was_dropped(reentrant: bool) -> None:
    """The ids may be drawn outside of the function that is computed again, or inside."""
    _, model = models("ours")
    x = torch.randn(B, S, 16, requires_grad=True)

    def inside(x: Tensor) -> Tensor:
        with mixed(model, adapter_dropout([0] * B, 0.5)):
            return model(x)

    def gradient(forward: Any) -> Tensor:
        torch.manual_seed(1)
        model.zero_grad()
        forward().square().sum().backward()
        return model.up.lora_B.grad.clone()

    want = gradient(lambda: inside(x))
    assert torch.equal(gradient(lambda: checkpoint(inside, x, use_reentrant=reentrant)), want)
    torch.manual_seed(1)
    model.zero_grad()
    with mixed(model, adapter_dropout([0] * B, 0.5)):
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(model.up.lora_B.grad, want)


def test_what_cannot_be_meant_is_refused() -> None:
    ids = torch.zeros(4, dtype=torch.int64)
    for given, p, kwargs, error, text in (
        (ids, 1.5, {}, ValueError, r"p must lie in \[0, 1\], got 1.5"),
        (ids, {0: -0.1}, {}, ValueError, r"p must lie in \[0, 1\], got -0.1"),
        (ids, {"a": 0.1}, {}, TypeError, "a probability for each number of ids, got one for 'a'"),
        (ids.view(1, 2, 2), 0.1, {}, ValueError, r"ids must be \[B\] or \[B, S\], got shape \(1, 2, 2\)"),
        (ids.float(), 0.1, {}, TypeError, "ids must be integers, got torch.float32"),
        (ids, 0.1, {"segments": [0, 1]}, ValueError, r"the shape of ids, \(4,\), .* got \(2,\)"),
        (ids, 0.1, {"segments": [0, 1, 2, -1]}, ValueError, "least -1"),
        ("audio", 0.1, {}, TypeError, r"write \['audio'\]"),
        (["audio", 1], 0.1, {}, TypeError, "either names or ids, got both"),
    ):
        with pytest.raises(error, match=text):
            adapter_dropout(given, p, **kwargs)
