"""`fuse(model, group=...)` computes layers that read the same x in one call. The numbers are those of single calls, and
no layer returns a result of another x."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from peft import LoraConfig, get_peft_model  # noqa: E402
from support import tiny_llama  # noqa: E402
from support.old_torch import compiles_whole_models  # noqa: E402
from support.peft_models import fused_layers, randomise  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft import shared  # noqa: E402
from lora_kernels.peft.fusing import FusedLinear  # noqa: E402

IDS = torch.tensor(tiny_llama.sequences(4))


def pair(**kwargs) -> tuple[nn.Module, nn.Module, lora_kernels.FuseReport]:
    """Return a fused model, a copy of it that is fused in groups, and the report of the copy."""
    single = tiny_llama.lora_llama(random=True, **kwargs)
    grouped = copy.deepcopy(single)
    lora_kernels.fuse(single)
    return single, grouped, lora_kernels.fuse(grouped, group=True)


def step(model: nn.Module, seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def calls_of_groups(monkeypatch) -> list[int]:
    """Return a list that grows by the number of layers at every call of a group."""
    calls: list[int] = []
    inner = shared.lora_linear_group
    monkeypatch.setattr(
        shared, "lora_linear_group", lambda x, layers, **kw: calls.append(len(layers)) or inner(x, layers, **kw)
    )
    return calls


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize(
    "kwargs", [{}, {"target_modules": ["q_proj", "v_proj"]}, {"rank_pattern": {"k_proj": 2}}, {"lora_bias": True}]
)
def test_a_grouped_model_trains_as_a_fused_one(kwargs, p):
    single, grouped, report = pair(lora_dropout=p, **kwargs)
    for _ in range(2):
        same(step(grouped), step(single))
    count = 2 if "target_modules" in kwargs else 4
    assert len(report.groups) == count and all(group.calls == 2 for group in report.groups.values())
    assert [layer.fused_calls for layer in fused_layers(grouped)] == [
        layer.fused_calls for layer in fused_layers(single)
    ]
    assert "self_attn" in str(report) and "one call for all, 2 so far" in str(report)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_grouped_model_trains_under_activation_checkpointing(reentrant):
    single, grouped, report = pair(lora_dropout=0.2)
    for model in (single, grouped):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
    same(step(grouped), step(single))
    assert all(group.calls == 2 for group in report.groups.values())


def test_one_call_serves_all_layers_of_a_group(monkeypatch):
    _, grouped, _ = pair()
    calls = calls_of_groups(monkeypatch)
    step(grouped)
    assert calls == [3, 2, 3, 2]


@compiles_whole_models
def test_a_grouped_model_compiles_into_one_graph():
    single, grouped, report = pair(layers=1)
    grouped.compile(backend="aot_eager", fullgraph=True)
    same(step(grouped), step(single))
    assert all(group.dissolved is None for group in report.groups.values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.disable_adapter_layers(), "q_proj: no adapter is to be computed"),
        (lambda m: m.merge_adapter(), "q_proj: no adapter is to be computed"),
        (lambda m: m.base_model.set_adapter(["default", "second"]), "q_proj: several adapters, or DoRA"),
    ],
)
def test_what_is_not_one_call_for_all_goes_layer_by_layer(change, reason):
    single, grouped, report = pair()
    for model in (single, grouped):
        model.add_adapter("second", tiny_llama.lora(r=2))
        change(model)
    with torch.no_grad():
        got, want = (model(input_ids=IDS, labels=IDS).loss for model in (grouped, single))
    assert torch.equal(got, want)
    for group in report.groups.values():
        assert group.calls == 0 and reason.partition(":")[2] in next(iter(group.passed_over))
    assert reason in {key for group in report.groups.values() for key in group.passed_over}


class Cross(nn.Module):
    """Attention whose queries read x and whose keys and values read another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, other):
        return self.query(x) + self.key(other) + self.value(other)


def cross(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Cross(), LoraConfig(r=2, target_modules=["query", "key", "value"], **kwargs))
    randomise(model)
    return model


def test_keys_and_values_of_a_second_input_are_one_call(monkeypatch):
    model, x, other = cross(), torch.randn(3, 8), torch.randn(3, 8)
    want = model(x, other)
    report = lora_kernels.fuse(model, group=True)
    calls = calls_of_groups(monkeypatch)
    for _ in range(2):
        torch.testing.assert_close(model(x, other), want)
    (group,) = report.groups.values()
    assert calls == [2, 2] and group.calls == 2 and group.dissolved is None
    got = model(x, x)
    assert calls == [2, 2, 3]
    lora_kernels.unfuse(model)
    torch.testing.assert_close(got, model(x, x))


def test_an_input_changed_in_place_is_another_input():
    class Writes(Cross):
        def forward(self, x, other):
            y = self.query(x)
            x.mul_(2)
            return y + self.key(x) + self.value(x)

    torch.manual_seed(0)
    model = get_peft_model(Writes(), LoraConfig(r=2, target_modules=["query", "key", "value"], init_lora_weights=False))
    x = torch.randn(3, 8)
    with torch.no_grad():
        want = model(x.clone(), None)
        lora_kernels.fuse(model, group=True)
        torch.testing.assert_close(model(x.clone(), None), want)


def test_nothing_is_left_from_a_forward_that_failed():
    class Fails(Cross):
        def forward(self, x, other):
            y = self.query(x)
            if other is None:
                raise RuntimeError("on purpose")
            return y + self.key(x) + self.value(x)

    torch.manual_seed(0)
    model = get_peft_model(Fails(), LoraConfig(r=2, target_modules=["query", "key", "value"], init_lora_weights=False))
    lora_kernels.fuse(model, group=True)
    x = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(x, None)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    got = model(x, x)
    lora_kernels.unfuse(model)
    torch.testing.assert_close(got, model(x, x))


def test_layers_called_past_their_parent_compute_for_themselves():
    model, x = cross(), torch.randn(3, 8)
    report = lora_kernels.fuse(model, group=True)
    model.base_model.model.key(x)
    (group,) = report.groups.values()
    assert group.calls == 0 and group.dissolved is None


def test_named_layers_are_grouped_where_they_are_equally_wide():
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_a, self.w_b, self.wide = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(16, 4)

        def forward(self, x):
            return self.w_a(x)[:, :4] + self.w_b(x) + self.wide(torch.cat([x, x], 1))

    model = get_peft_model(Mine(), LoraConfig(r=2, target_modules=["w_a", "w_b", "wide"]))
    assert not lora_kernels.fuse(model, group=True).groups
    assert not lora_kernels.fuse(model, group=[("w_a", "wide")]).groups  # they read inputs of different widths
    (group,) = lora_kernels.fuse(model, group=[("w_a", "w_b")]).groups.values()
    model(torch.randn(3, 8))
    assert group.names == ("w_a", "w_b") and group.calls == 1


def test_fuse_and_unfuse_end_the_groups_of_before():
    single, grouped, report = pair()
    again = lora_kernels.fuse(grouped)
    assert not again.groups and all(group.dissolved for group in report.groups.values())
    assert all(not module._forward_pre_hooks for module in grouped.modules())
    report = lora_kernels.fuse(grouped, group=True)
    assert len(report.groups) == 4
    lora_kernels.unfuse(grouped)
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in grouped.modules())
    assert not any(isinstance(module, FusedLinear) or hasattr(module, "_group") for module in grouped.modules())
    same(step(grouped), step(single))


def test_a_copy_and_a_pickle_have_groups_of_their_own():
    single, grouped, report = pair()
    for twin in (copy.deepcopy(grouped), pickle.loads(pickle.dumps(grouped))):
        same(step(twin), step(single))
        groups = {layer._group.report for layer in fused_layers(twin) if layer._group is not None}
        assert len(groups) == 4 and all(group.calls == 1 for group in groups)
        assert groups.isdisjoint(report.groups.values())
    assert all(group.calls == 0 for group in report.groups.values())


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = {
    "Qwen3": ({"vocab_size": 32, "num_key_value_heads": 1, "head_dim": 8}, 2),
    "Qwen2": ({"vocab_size": 32, "num_key_value_heads": 1}, 2),
    "Mistral": ({"vocab_size": 32, "num_key_value_heads": 1}, 2),
    "Gemma": ({"vocab_size": 32, "num_key_value_heads": 1, "head_dim": 8}, 2),
    "GPTNeoX": ({"vocab_size": 32}, 0),
    "Bert": ({"vocab_size": 32}, 1),
    "ViT": ({"image_size": 8, "patch_size": 4}, 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_are_grouped_in_their_models(family):
    special, count = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**SMALL, **special)
    torch.manual_seed(0)
    model = get_peft_model(
        getattr(transformers, f"{family}Model")(config),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    ).eval()
    given = {"pixel_values": torch.randn(2, 3, 8, 8)} if family == "ViT" else {"input_ids": torch.randint(32, (2, 5))}
    want = model(**given).last_hidden_state
    report = lora_kernels.fuse(model, group=True)
    torch.testing.assert_close(model(**given).last_hidden_state, want)
    assert len(report.groups) == count
    assert all(group.calls == 1 and group.dissolved is None for group in report.groups.values())
