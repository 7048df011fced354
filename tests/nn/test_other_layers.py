"""Layers with adapters of other libraries and kinds are found and named, with what to do about each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels.nn.other_layers import other_layers, told, way_out


def a_class(name: str, module: str, **members) -> type[nn.Module]:
    """Return a class of modules as another library may have it: `members` make its parameters and children."""

    def init(self):
        nn.Module.__init__(self)
        for key, make in members.items():
            setattr(self, key, make())

    return type(name, (nn.Module,), {"__init__": init, "__module__": module})


def linear() -> nn.Module:
    return nn.Linear(2, 2)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("module", "members", "way"),
    [
        ("loralib.layers", {"lora_A": parameter, "lora_B": parameter}, "load_loralib"),
        ("torchtune.modules.peft.lora", {"lora_a": linear, "lora_b": linear}, "load_adapter"),
        ("lycoris.modules.locon", {"lora_down": linear, "lora_up": linear}, "load_lycoris"),
        ("networks.lora", {"lora_down": linear, "lora_up": linear}, "load_lycoris"),
        ("diffusers.models.lora", {"lora_layer": linear}, "load_lora_weights"),
        ("megatron.bridge.peft.utils", {"linear_in": linear, "linear_out": linear}, "export its adapter"),
        ("nemo_automodel.components.lora", {"lora_A": linear, "lora_B": linear}, "export its adapter"),
        ("litgpt.lora", {"lora_A": parameter, "lora_B": parameter}, "apply_lora"),
        ("somebodys.model", {"lora_A": linear, "lora_B": linear}, "PEFT's format"),
    ],
)
def test_layers_of_other_libraries_are_counted_with_a_way_out(module, members, way):
    kind = a_class("LoRALinear", module, **members)
    model = nn.Sequential(kind(), nn.Linear(2, 2), nn.Sequential(kind()))
    found = other_layers(model, lambda _: False)
    assert found == {f"{module}.LoRALinear": 2}
    text = told(found)
    assert text.startswith(f"2 layers of {module}.LoRALinear, which fuse does not serve: ") and way in text


def test_linear_in_and_linear_out_of_other_packages_are_no_adapter():
    kind = a_class("FeedForward", "somebodys.model", linear_in=linear, linear_out=linear)
    assert not other_layers(nn.Sequential(kind()), lambda _: False)


def test_a_layer_without_an_adapter_at_present_is_none():
    kind = a_class("LoRACompatibleLinear", "diffusers.models.lora")
    layer = kind()
    layer.lora_layer = None
    assert not other_layers(nn.Sequential(layer, nn.Linear(2, 2)), lambda _: False)


def test_plain_models_have_none():
    assert not other_layers(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1), lambda _: False)


def test_our_own_layers_need_no_fuse_and_their_parts_do_not_count():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    lora_kernels.apply_lora(model)
    found = other_layers(model, lambda _: False)
    assert found == {"lora_kernels.nn.linear.FusedLoRALinear": 2} and "need no fuse" in told(found)


@pytest.mark.parametrize("config", ["LoHaConfig", "LoKrConfig", "IA3Config"])
def test_other_tuners_of_peft_are_named(config):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    settings = {"feedforward_modules": []} if config == "IA3Config" else {}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), getattr(peft, config)(target_modules=["0"], **settings))
    (name,) = other_layers(model, lambda _: False)
    assert name.startswith("peft.tuners.") and "AdaLoRA" in way_out(name)
    with pytest.raises(RuntimeError, match=f"no LoRA layer of PEFT in this model; it has 1 layer of {name}"):
        lora_kernels.fuse(model, strict=True)
    assert str(lora_kernels.fuse(model)).startswith(
        "0 of 0 LoRA layers fused: the model has none of PEFT; it has 1 layer"
    )
