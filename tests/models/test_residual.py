"""`apply_reslora` finds the layers of a kind in consecutive blocks, and refuses what would be wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from support.inject_models import MODELS, run
from support.residual_models import Blocks, adapters, fill
from torch import nn

from lora_kernels import apply_lora, apply_reslora
from lora_kernels.models.residual_chains import lines_of
from lora_kernels.nn.conv1d import FusedLoRAConv1D
from lora_kernels.nn.residual import QuantizedResLoRALinear, ResLoRAConv1D, ResLoRALinear


def patterns(names: list[str], blocks: str | None = None) -> dict[str, list[tuple[str, ...]]]:
    found: dict[str, list[tuple[str, ...]]] = {}
    for line in lines_of(dict.fromkeys(names, "4 → 4"), blocks):
        found.setdefault(line.pattern, []).append(line.names)
    return found


def test_the_first_number_in_a_name_is_that_of_the_block():
    names = [
        "layers.0.q",
        "layers.10.q",
        "layers.2.q",
        "layers.0.mlp.experts.1.up",
        "layers.1.mlp.experts.1.up",
        "head",
    ]
    assert patterns(names) == {
        "layers.*.q": [("layers.0.q", "layers.2.q", "layers.10.q")],
        "layers.*.mlp.experts.1.up": [("layers.0.mlp.experts.1.up", "layers.1.mlp.experts.1.up")],
        "head": [("head",)],
    }
    assert patterns(["0", "2"]) == {"*": [("0", "2")]}
    with pytest.raises(ValueError, match=r"nothing to make a shortcut from: encoder\.q7, head\. apply_lora is ResLoRA"):
        patterns(["encoder.q7", "head"])


def test_the_list_of_blocks_can_be_named():
    names = ["stages.0.blocks.0.fc", "stages.0.blocks.1.fc", "stages.1.blocks.0.fc"]
    assert patterns(names) == {
        "stages.*.blocks.0.fc": [("stages.0.blocks.0.fc", "stages.1.blocks.0.fc")],
        "stages.*.blocks.1.fc": [("stages.0.blocks.1.fc",)],
    }
    assert patterns(names, "blocks") == {
        "stages.0.blocks.*.fc": [("stages.0.blocks.0.fc", "stages.0.blocks.1.fc")],
        "stages.1.blocks.*.fc": [("stages.1.blocks.0.fc",)],
    }
    with pytest.raises(ValueError, match=r"blocks='layer' is the name of no list around stages\.0\.blocks\.0\.fc"):
        patterns(names, "layer")


def test_a_layer_of_another_size_begins_a_new_chain():
    sizes = {f"layers.{i}.fc": size for i, size in enumerate(["4 → 4", "4 → 4", "4 → 8", "8 → 8", "8 → 8"])}
    names = [f"layers.{i}.fc" for i in range(5)]
    assert [line.names for line in lines_of(sizes, None)] == [tuple(names[:2]), (names[2],), tuple(names[3:])]


@pytest.mark.parametrize("structure", ["bs", "is", "ms"])
def test_models_of_transformers_get_shortcuts_and_a_new_one_computes_what_its_base_computes(structure):
    for kind in ("llama", "neox", "bert"):
        model = MODELS[kind]().double().eval()
        want = run(model, kind)
        report = apply_reslora(model, structure, r=2)
        torch.testing.assert_close(run(model, kind), want, rtol=1e-12, atol=1e-12)
        first = {name for name, earlier in report.shortcuts.items() if not earlier}
        second = {name: earlier for name, earlier in report.shortcuts.items() if earlier}
        assert second and all(earlier == (name.replace(".1.", ".0."),) for name, earlier in second.items())
        assert all(".1." not in name for name in first)
        fill(model)
        y = run(model, kind)
        y.square().sum().backward()
        assert (y - want).abs().max() > 1e-3
        assert all(p.grad.abs().max() > 0 for p in adapters(model).values())


@pytest.mark.parametrize("structure", ["bs", "is", "ms"])
def test_a_conv1d_of_transformers_has_shortcuts_too(structure):
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8)).double().eval()
    apply_reslora(model, structure, r=2, lora_alpha=2, target_modules=["c_fc"])
    layer = fill(model).h[1].mlp.c_fc
    assert isinstance(layer, ResLoRAConv1D) and isinstance(layer, FusedLoRAConv1D)
    seen = []
    for block in model.h:
        block.mlp.c_fc.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    model(torch.arange(6)[None])
    (x0, _), (x, y) = seen
    a0, b0, a, b = (p for name, p in adapters(model).items())
    update = {
        "bs": x @ a.T @ b.T + x @ a0.T @ b0.T,
        "is": (x + x0) @ a.T @ b.T,
        "ms": (x @ a.T + x0 @ a0.T) @ b.T,
    }[structure]
    torch.testing.assert_close(y, x @ layer.weight + layer.bias + update)


def test_the_report_tells_the_shortcuts_and_the_ranks():
    model = Blocks()
    report = apply_reslora(
        model, previous=None, r=2, target_modules=["q", "up"], rank_pattern={"blocks.1.q": 5}, alpha_pattern={"up": 6}
    )
    assert report.shortcuts["blocks.2.q"] == ("blocks.1.q", "blocks.0.q") and report.shortcuts["blocks.0.up"] == ()
    assert (report.ranks["blocks.2.q"], report.ranks["blocks.1.q"], report.ranks["blocks.0.q"]) == (9, 7, 2)
    assert [layer.r for layer in report.layers] == [2, 2, 5, 2, 2, 2]
    text = str(report)
    assert 'structure "bs": 4 of 6 layers have shortcuts, from up to 2 earlier blocks; each' in text
    assert "LoRA of a rank up to 9" in text
    assert "without a shortcut, first of their kind and size: blocks.0.q, blocks.0.up" in text
    assert report.verify(model, torch.randn(2, 7)).without_effect == {}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapters(model))


def test_blocks_without_an_adapter_are_passed_over():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(5)))
    names = ["0.0", "2.0", "3.0"]
    report = apply_reslora(model, "ms", r=2, target_modules=names)
    assert report.shortcuts == {"0.0": (), "2.0": ("0.0",), "3.0": ("2.0",)}


@pytest.mark.parametrize("structure", ["is", "ms"])
def test_the_innermost_module_around_the_blocks_opens_and_closes_the_forward(structure):
    model = MODELS["llama"]().eval()
    apply_reslora(model, structure, r=2, target_modules=["q_proj"])
    having = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    assert having == ["model"]
    y = model(input_ids=torch.arange(5)[None]).logits
    assert torch.equal(model.lm_head(model.model(input_ids=torch.arange(5)[None]).last_hidden_state), y)


def test_a_model_that_generates_with_a_cache_computes_what_one_forward_computes():
    model = MODELS["llama"]().double().eval()
    apply_reslora(model, "ms", r=2)
    fill(model)
    ids = model.generate(torch.arange(1, 5)[None], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert ids.shape == (1, 9)
    assert torch.equal(model(input_ids=ids).logits[0, 3:-1].argmax(-1), ids[0, 4:])


def test_a_quantised_model_has_quantised_layers_with_shortcuts():
    model = Blocks(32, 64)
    report = apply_reslora(model, r=2, quant="nf4", exclude_modules=["head"])
    assert report.quantised is not None and report.quantised[1] < report.quantised[0] / 4
    assert {type(model.blocks[i].q) for i in range(3)} == {QuantizedResLoRALinear}


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer["experts"][0](x)
        return x


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, i):
        return self.blocks[1](self.blocks[0](self.embed(i)))


REFUSED = [
    (Blocks, {"structure": "xs"}, 'structure must be "bs", "is" or "ms", got \'xs\''),
    (Blocks, {"previous": -1}, "previous must be a number of blocks, or None for all, got -1"),
    (Blocks, {"previous": True}, "got True"),
    (Blocks, {"structure": "is", "previous": 2}, "previous must be 1, got 2"),
    (Blocks, {"structure": "is", "previous": None}, "previous must be 1, got None"),
    (Blocks, {"blocks": "layers"}, "blocks='layers' is the name of no list"),
    (Blocks, {"target_modules": ["head"]}, "nothing to make a shortcut from: head"),
    (Blocks, {"target_modules": ["nothing"]}, "match no layer"),
    (Blocks, {"r": 0}, "r must be an integer of at least 1, got 0"),
    (
        Blocks,
        {"structure": "ms", "rank_pattern": {"blocks.1.q": 2}},
        r"they need one rank: blocks\.0\.q \(8\), blocks\.1\.q \(2\), blocks\.2\.q \(8\)",
    ),
    (Routed, {"structure": "is"}, r"belong to experts.*layers\.0\.experts\.0.*take structure=\"bs\""),
    (Other, {"target_modules": ["embed", "0", "1"]}, r"for linear layers, and these are none: embed \(a Embedding\)"),
    (lambda: apply_lora(model := Blocks()) and model, {}, "has layers with adapters already"),
]


@pytest.mark.parametrize(("make", "settings", "message"), REFUSED)
def test_what_cannot_be_is_refused_and_the_model_is_unchanged(make, settings, message):
    model = make()
    before = [(name, type(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        apply_reslora(model, **settings)
    assert [(n, type(module), len(module._forward_pre_hooks)) for n, module in model.named_modules()] == before
    assert [p.requires_grad for p in model.parameters()] == trained


def test_experts_take_block_shortcuts_of_the_same_expert():
    model = Routed()
    report = apply_reslora(model, r=2)
    assert report.shortcuts["layers.1.experts.0"] == ("layers.0.experts.0",)


def test_training_learns_through_the_shortcuts_alone():
    """Only A and B of the first block train, and yet the last block's layers change what they compute."""
    torch.manual_seed(0)
    model = Blocks()
    apply_reslora(model, previous=None, r=2, target_modules=["q"])
    x, target = torch.randn(32, 7), torch.randn(32, 4)
    for name, p in adapters(model).items():
        p.requires_grad_(".0." in name)
    before = copy.deepcopy(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert isinstance(model.blocks[2].q, ResLoRALinear)
    assert not torch.equal(model.blocks[2].q(x), before.blocks[2].q(x))
