"""The report of `fuse` says "fused" only of layers whose calls reach the fused forward, at once or by `verify`."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from support.peft_models import Net, fused_layers, make
from torch import nn

from lora_kernels import fuse, unfuse
from lora_kernels.peft.fused import Fused

X = torch.randn(4, 24)


def mlp_past_the_layers(self, x):
    """A forward as kernel packages patch it in: it computes base and adapter itself."""
    for layer in (self.up, self.down):
        low = F.linear(F.linear(x, layer.lora_A["default"].weight), layer.lora_B["default"].weight)
        x = F.linear(x, layer.base_layer.weight, layer.base_layer.bias) + low * layer.scaling["default"]
    return self.head(x)


class Reads(Net):
    def forward(self, x):
        return self.head(F.linear(torch.tanh(self.up(x)), self.down.weight))


class Sometimes(Net):
    def forward(self, x):
        x = self.up(x) if x.sum() > 1e9 else F.linear(x, self.up.weight)
        return self.head(self.down(x))


def test_a_layer_that_its_parent_reads_is_not_fused():
    model = make(net=Reads)
    report = fuse(model)
    assert list(report.fused) == ["base_model.model.up"]
    assert report.not_fused == {
        "base_model.model.down": "Reads.forward reads its weight or bias without calling it, past an adapter"
    }
    model(X)
    assert [layer.fused_calls for layer in fused_layers(model)] == [1]
    with pytest.raises(RuntimeError, match=r"Reads\.forward reads"):
        fuse(make(net=Reads), strict=True)


def test_out_proj_of_torchs_attention_is_not_fused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    report = fuse(get_peft_model(model, LoraConfig(target_modules="all-linear")))
    assert sorted(name.rpartition(".")[2] for name in report.fused) == ["linear1", "linear2"]
    assert "MultiheadAttention.forward reads" in report.not_fused["base_model.model.layers.0.self_attn.out_proj"]


@pytest.mark.parametrize("padded", [False, True])
def test_the_inference_path_of_an_encoder_does_not_skip_fused_layers(padded):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2)
    config = LoraConfig(target_modules=["linear1", "linear2"], init_lora_weights=False)
    model, x = get_peft_model(encoder, config), torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    want = model(x, src_key_padding_mask=mask)[:, :3]
    report = fuse(model, strict=True, verify={"src": x, "src_key_padding_mask": mask})
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=mask)[:, :3], want)
    assert len(report.fused) == 4 and all(layer.fused_calls == 1 for layer in fused_layers(model))


def test_a_layer_that_may_be_read_is_fused_with_a_doubt_that_verify_settles():
    model = make(net=Sometimes)
    report = fuse(model)
    assert "; but Sometimes.forward may read its weight" in report.fused["base_model.model.up"]
    after = report.verify(model, X)
    assert list(after.fused) == ["base_model.model.down"]
    assert after.not_fused["base_model.model.up"] == "in training mode other code read its weight, past its adapter"


def test_a_hook_of_accelerate_reaches_the_fused_forward():
    hooks = pytest.importorskip("accelerate.hooks")
    model = make().eval()
    layer, want = model.base_model.model.up, model(X)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    assert len(fuse(model, strict=True).fused) == 2
    torch.testing.assert_close(model(X), want)
    assert layer.fused_calls == 1
    unfuse(model)
    torch.testing.assert_close(model(X), want)
    assert not isinstance(layer, Fused)
    fuse(model)
    hooks.remove_hook_from_module(layer)
    torch.testing.assert_close(model(X), want)
    assert layer.fused_calls == 1


def test_a_hook_that_comes_after_fusing_is_left_in_order_by_unfuse():
    hooks = pytest.importorskip("accelerate.hooks")
    model = make().eval()
    fuse(model)
    want = model(X)
    hooks.add_hook_to_module(model.base_model.model.up, hooks.AlignDevicesHook(execution_device="cpu"))
    assert len(fuse(model, strict=True).fused) == 2
    unfuse(model)
    torch.testing.assert_close(model(X), want)


def test_a_layer_with_another_patch_is_not_fused():
    model = make()
    layer = model.base_model.model.up
    layer.forward = types.MethodType(lambda self, x: type(self).forward(self, x), layer)
    report = fuse(model)
    assert "replaced on the instance" in report.not_fused["base_model.model.up"]
    assert not isinstance(layer, Fused)
    with pytest.raises(RuntimeError, match="replaced on the instance"):
        fuse(model, strict=True)


def test_the_report_tells_later_which_layers_had_no_fused_call():
    model = make()
    inner = model.base_model.model
    inner.forward = types.MethodType(mlp_past_the_layers, inner)
    report = fuse(model)
    assert str(report).splitlines()[0] == "2 of 2 LoRA layers fused"
    inner.down(torch.randn(2, 40))
    text = str(report).splitlines()
    assert text[0] == "2 of 2 LoRA layers fused; 1 of them had no fused call so far, though the model has run"
    assert text[1].endswith(", not called so far") and "so far" not in text[2]
    unfuse(model)
    assert "but no longer: unfuse was called" in str(report)


def test_the_report_tells_later_which_layers_were_left_to_peft():
    model = make()
    report = fuse(model)
    for layer in fused_layers(model):
        layer.base_layer.register_forward_hook(lambda *_: None)
    model(X), model(X)
    reason = "its base layer has hooks, which the fused path would pass over (a forward hook, "
    assert "2 of them had no fused call so far" in str(report)
    assert f"left to PEFT in every call so far: {reason}" in str(report)


def test_verify_changes_no_counter_and_takes_groups_along():
    config = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"])

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)

    model = get_peft_model(Three(), config)
    report = fuse(model, strict=True, group=True, verify=torch.randn(2, 8))
    assert len(report.fused) == 3
    assert all(layer.fused_calls == 0 and not layer.passed_over for layer in fused_layers(model))
    assert all(group.calls == 0 and group.dissolved is None for group in report.groups.values())
    model(torch.randn(2, 8))
    assert all(layer.fused_calls == 1 for layer in fused_layers(model))


def test_verify_finds_a_patched_parent_and_a_call_that_is_left_to_peft():
    model = make()
    inner = model.base_model.model
    inner.forward = types.MethodType(mlp_past_the_layers, inner)
    reason = "it was not called: other code computed its adapter"
    assert set(fuse(model).verify(model, X).not_fused.values()) == {reason}
    del inner.forward
    report = fuse(model, verify=X)
    assert not report.not_fused
    inner.up.base_layer.register_forward_hook(lambda *_: None)
    (why,) = report.verify(model, X).not_fused.values()
    assert why.startswith("its base layer has hooks, which the fused path would pass over (a forward hook, ")


def test_strict_with_verify_raises_and_fuses_nothing():
    model = make(net=Sometimes)
    with pytest.raises(RuntimeError, match=r"1 of 2 LoRA layers fused(.|\n)*other code read its weight"):
        fuse(model, strict=True, verify=X)
    assert not fused_layers(model)
    fuse(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fuse(model, verify=torch.randn(2, 5))
    assert len(fused_layers(model)) == 2  # they were fused before


@pytest.mark.parametrize("bad", ["inputs", "strict", "interrupted", "grouping"])
def test_a_failed_call_leaves_layers_that_were_fused_before_as_they_were(monkeypatch, bad):
    class Attention(nn.Module):
        """q and k are called; v is too, but where it is told so it is read."""

        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(24, 24) for _ in range(3))
            self.read = False

        def forward(self, x):
            v = F.linear(x, self.v_proj.base_layer.weight) if self.read else self.v_proj(x)
            return self.q_proj(x) + self.k_proj(x) + v

    inner = Attention()
    model = get_peft_model(inner, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    before = fuse(model, group=[("q_proj", "k_proj")], backend="eager")
    unfuse(inner.v_proj)
    layers = (inner.q_proj, inner.k_proj)
    hooks = len(inner._forward_pre_hooks), len(inner._forward_hooks)
    inner.read = bad == "strict"
    error, inputs = RuntimeError, X
    if bad == "inputs":
        error, inputs = ValueError, torch.randn(2, 5)
    elif bad == "interrupted":
        error = KeyboardInterrupt
        inner.register_forward_hook(handle := Interrupting())
    elif bad == "grouping":
        monkeypatch.setattr("lora_kernels.peft.groups.Group.hook", Interrupting())
        error = KeyboardInterrupt
    with pytest.raises(error):
        fuse(model, group=True, strict=True, verify=inputs)
    if bad == "interrupted":
        handle.off = True
        inner._forward_hooks.popitem()
    inner.read = False
    assert len(fused_layers(model)) == 2 and not isinstance(inner.v_proj, Fused)
    assert [layer._backend for layer in layers] == ["eager", "eager"]
    assert (len(inner._forward_pre_hooks), len(inner._forward_hooks)) == hooks
    (group,) = before.groups.values()
    assert layers[0]._group is layers[1]._group and layers[0]._group.report is group
    model(X)
    assert group.dissolved is None and group.calls == 1
    unfuse(model)
    assert group.dissolved == "unfuse was called"


class Interrupting:
    off = False

    def __call__(self, *_, **__):
        if not self.off:
            raise KeyboardInterrupt


def test_disabled_and_merged_adapters_are_not_judged():
    model = make()
    report = fuse(model)
    with model.disable_adapter():
        assert report.verify(model, X).not_fused == {}
    model.merge_adapter()
    assert report.verify(model, X).not_fused == {}


def test_strict_and_verify_refuse_a_model_without_lora():
    with pytest.raises(RuntimeError, match="no LoRA layer of PEFT"):
        fuse(Net(), strict=True)
    report = fuse(Net())
    assert "the model has none" in str(report)
    for call in (lambda: fuse(Net(), verify=X), lambda: report.verify(Net(), X)):
        with pytest.raises(ValueError, match="nothing to verify: 0 of 0 LoRA layers fused"):
            call()


def test_strict_refuses_a_verification_that_could_judge_no_layer():
    model = make()
    model.disable_adapter_layers()
    with pytest.raises(RuntimeError, match="could judge none of the 2 LoRA layers"):
        fuse(model, strict=True, verify=X)
    assert not fused_layers(model)
    assert not fuse(model, verify=X).not_fused
