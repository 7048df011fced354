"""Malicious adapter files raise errors that name the fault, and leave the model as it was."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lora_kernels import apply_lora, load_adapter, save_adapter

st = pytest.importorskip("safetensors.torch")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))


def adapted() -> nn.Module:
    model = plain()
    apply_lora(model, r=2)
    return model


@pytest.fixture
def directory(tmp_path):
    save_adapter(adapted(), tmp_path)
    return tmp_path


def refused(directory, message: str) -> None:
    for make in (plain, adapted):
        model = make()
        before, trained = (
            {key: value.clone() for key, value in model.state_dict().items()},
            [p.requires_grad for p in model.parameters()],
        )
        with pytest.raises(ValueError, match=message):
            load_adapter(model, directory)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == trained


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers_to_transform", "0"),
        ("layers_to_transform", {"0": 1}),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", 3),
        ("layers_pattern", [3]),
        ("target_modules", [0, 1]),
        ("target_modules", [["0"]]),
        ("exclude_modules", [3]),
    ],
)
def test_a_field_of_another_type_is_named(directory, key, value):
    config = json.loads((directory / CONFIG).read_bytes())
    (directory / CONFIG).write_text(json.dumps(config | {key: value}))
    refused(directory, f"{key}=.* is not what LoraConfig has there")


def test_a_pattern_that_is_no_regular_expression_is_named(directory):
    config = json.loads((directory / CONFIG).read_bytes())
    (directory / CONFIG).write_text(json.dumps(config | {"layers_to_transform": [0], "layers_pattern": "(("}))
    refused(directory, "layers_pattern: .* is no regular expression")


def test_a_config_nested_too_deep_is_refused(directory):
    (directory / CONFIG).write_text("[" * 100_000 + "]" * 100_000)
    refused(directory, "not JSON")


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8, torch.complex64])
def test_tensors_of_no_floating_dtype_are_refused(directory, dtype, part):
    tensors = st.load_file(directory / WEIGHTS)
    for key in tensors:
        if part in key:
            tensors[key] = tensors[key].to(dtype)
    st.save_file(tensors, directory / WEIGHTS)
    refused(directory, f"the adapter of 0 is {dtype}, no floating type")
