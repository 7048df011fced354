"""Newcomers' mistakes raise errors that name the values at fault and the way out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear, apply_lora, load_adapter


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.q_proj(x) + self.k_proj(x)


def test_a_name_given_as_a_string_gets_a_hint():
    with pytest.raises(ValueError, match=r"whole name: \['q_proj'\] is for ends of names"):
        apply_lora(nn.Sequential(Block()), target_modules="q_proj")
    with pytest.raises(ValueError, match=r"match no layer") as error:
        apply_lora(nn.Sequential(Block()), target_modules="qproj")
    assert "whole name" not in str(error.value)


@pytest.mark.parametrize("alpha", ["16", None, torch.tensor(16.0)])
def test_an_alpha_that_is_no_number_is_named(alpha):
    with pytest.raises(ValueError, match="lora_alpha must be a finite number, got"):
        FusedLoRALinear(8, 8, lora_alpha=alpha)


def test_a_file_in_place_of_its_directory_is_named(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"is a file, and must be the directory of an adapter"):
        load_adapter(nn.Sequential(Block()), path)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("qkv", r"families of two names or more, as in .*got 'qkv'"),
        (("q_proj", "k_proj"), r"families of two names or more"),
        ([("q_proj",)], r"families of two names or more"),
        ([("q_proj", "k_proj"), ("wq", "wk")], r"no module of the model has two of 'wq', 'wk'"),
    ],
)
def test_groups_that_the_model_does_not_have_are_named(group, message):
    peft = pytest.importorskip("peft")
    from lora_kernels import fuse

    model = peft.get_peft_model(nn.Sequential(Block()), peft.LoraConfig(target_modules=["q_proj", "k_proj"]))
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        fuse(model, group=group)
    assert [type(module) for module in model.modules()] == before
    assert fuse(model, group=[("q_proj", "k_proj")]).groups
