"""GPT-2 with adapters on its Conv1D layers: files are PEFT's, and checkpoints those of a plain model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers.pytorch_utils import Conv1D  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels import FusedLoRAConv1D  # noqa: E402
from lora_kernels.serving.layer import install  # noqa: E402

IDS = torch.tensor([[1, 5, 9, 3], [2, 2, 7, 0]])


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_embd=24, n_head=2, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def adapted(base: nn.Module, **kwargs) -> nn.Module:
    model = copy.deepcopy(base)
    lora_kernels.apply_lora(model, **({"r": 3, "lora_alpha": 6} | kwargs))
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("use_dora", [False, True])
def test_all_linear_takes_every_conv1d_and_leaves_the_tied_head(base, use_dora):
    model = copy.deepcopy(base)
    report = lora_kernels.apply_lora(model, r=3, use_dora=use_dora)
    assert len(report.layers) == 4 and all(isinstance(m, FusedLoRAConv1D) for m in lora_layers(model))
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits)


def lora_layers(model: nn.Module) -> list[nn.Module]:
    block = model.transformer.h[0]
    return [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_file_of_ours_is_pefts_and_a_file_of_peft_is_ours(base, use_dora, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = adapted(base, use_dora=use_dora)
    want = model(IDS).logits
    lora_kernels.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(theirs(IDS).logits, want)
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    lora_kernels.load_adapter(again, tmp_path / "theirs")
    assert all(isinstance(layer, FusedLoRAConv1D) for layer in lora_layers(again))
    torch.testing.assert_close(again.eval()(IDS).logits, want)


def test_the_config_of_a_file_says_that_w_is_stored_transposed(base, tmp_path: Path):
    """PEFT warns of a fan_in_fan_out that is not the layers', and computes as the layer is."""
    lora_kernels.save_adapter(adapted(base), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize("value", [False, True])
def test_fan_in_fan_out_of_a_file_changes_nothing(base, value, tmp_path: Path):
    model = adapted(base)
    lora_kernels.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": value}))
    again = copy.deepcopy(base)
    lora_kernels.load_adapter(again, tmp_path)
    torch.testing.assert_close(again.eval()(IDS).logits, model(IDS).logits)


def test_merging_gives_a_gpt2_with_conv1d_whose_checkpoint_is_a_plain_one(base):
    model = adapted(base)
    want = model(IDS).logits
    merged = lora_kernels.merge_and_unload(model)
    assert all(type(layer) is Conv1D for layer in lora_layers(merged))
    torch.testing.assert_close(merged(IDS).logits, want)
    plain = copy.deepcopy(base)
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(plain(IDS).logits, want)


def test_a_plain_checkpoint_loads_into_an_adapted_model(base):
    model, other = adapted(base), copy.deepcopy(base)
    for p in other.parameters():
        nn.init.normal_(p, std=0.1)
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected and not missing
    for layer in lora_layers(model):
        layer.scaling = 0.0
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits)


def test_one_step_trains_the_adapters_alone(base):
    model = adapted(base).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = copy.deepcopy(dict(model.named_parameters()))
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(trained, lr=1.0).step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is ("lora_" not in name), name


def test_quant_is_refused_by_name(base):
    with pytest.raises(ValueError, match="is not for a Conv1D"):
        lora_kernels.apply_lora(copy.deepcopy(base), quant="nf4", target_modules=["c_fc"])


def test_a_pool_serves_no_conv1d_of_either_kind(base):
    for model, reason in ((copy.deepcopy(base), "a Conv1D"), (adapted(base), "a FusedLoRAConv1D")):
        served, passed_over, put_back = install(model)
        assert list(served) == ["lm_head"]
        assert sum(reason in why for why in passed_over.values()) == (4 if reason == "a FusedLoRAConv1D" else 0)
        put_back()
