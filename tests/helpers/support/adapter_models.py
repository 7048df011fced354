"""Models that get adapters, functions that change adapter files, and the state that loading a file could change."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.models.inject import apply_lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    inner = nn.Sequential(OrderedDict(fc=nn.Linear(8, 8), act=nn.Tanh(), out=nn.Linear(8, 6, bias=False)))
    model = nn.Sequential(OrderedDict(fc=nn.Linear(5, 8), norm=nn.LayerNorm(8), inner=inner, head=nn.Linear(6, 4)))
    return model.to(dtype).eval()


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def train(model: nn.Module) -> nn.Module:
    """Give every adapter other values than its initial ones."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:  # near the norm, as after training
                parameter.mul_(0.5 + torch.rand(parameter.shape).to(parameter.dtype))
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) / 3)
    return model


def adapted(model: nn.Module, **rules) -> nn.Module:
    apply_lora(model, **rules)
    return train(model)


def run(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
        return model(input_ids=torch.randint(32, (2, 6), generator=generator)).logits
    return model(torch.randn(7, 5, generator=generator).to(dtype))


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:  # both models round terms of about 1 in each of three layers
        torch.testing.assert_close(a, b, rtol=2**-5, atol=2**-4)
    else:
        torch.testing.assert_close(a, b)


def edit_config(directory: Path, **fields: object) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | fields))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    st = pytest.importorskip("safetensors.torch")
    tensors = st.load_file(directory / WEIGHTS)
    change(tensors)
    st.save_file(tensors, directory / WEIGHTS)


def state(model: nn.Module) -> dict[str, object]:
    """Return everything that an attempt to load could change."""
    settings = {
        name: (m.r, m.lora_alpha, m.scaling, m.use_rslora, m.use_dora)
        for name, m in model.named_modules()
        if isinstance(m, FusedLoRALinear)
    }
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "kinds": [type(m) for m in model.modules()],
        "settings": settings,
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = state(model)
    torch.testing.assert_close(after.pop("values"), before["values"], rtol=0, atol=0, equal_nan=True)
    assert after == {key: value for key, value in before.items() if key != "values"}
