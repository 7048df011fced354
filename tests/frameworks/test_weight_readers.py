"""Models of other libraries that read a linear layer's weight past its forward: each layer is served or refused, and a
report names no layer that computes nothing. Packages that are not in requirements-dev.txt are tried where they are
installed."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from support.tiny_readers import IDS, MODELS, SLOW  # noqa: E402

from lora_kernels import FusedLoRALinear, apply_lora, fuse  # noqa: E402
from lora_kernels.peft.fused import Fused  # noqa: E402

KINDS = [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in MODELS]


def ends(names) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def config(names: set[str]):
    """Return a config for the layers with exactly these dotted names."""
    return peft.LoraConfig(r=2, target_modules="|".join(map(re.escape, sorted(names))))


def adapted(model: nn.Module, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return apply_lora(model, r=2, **settings)


def trained(model: nn.Module, inputs: dict, kind: type, part: Callable) -> tuple[set[str], set[str]]:
    """Return the names of the layers of class `kind` whose B gets a gradient in training mode, and those whose does
    not."""
    y = model.train()(**inputs)
    y = next(t for t in (y.values() if isinstance(y, dict) else [y]) if isinstance(t, torch.Tensor))
    y.float().square().sum().backward()
    layers = {name: part(layer).grad is not None for name, layer in model.named_modules() if isinstance(layer, kind)}
    return {name for name, got in layers.items() if got}, {name for name, got in layers.items() if not got}


@pytest.mark.parametrize("kind", KINDS)
def test_apply_lora_adapts_no_layer_that_computes_nothing(kind):
    make, inputs, read = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    report = adapted(model, verify=inputs)
    told = {name for name, why in report.passed_over.items() if "reads its weight" in why} | set(report.without_effect)
    assert ends(told) == read - ends(name for name, why in report.passed_over.items() if why == "the output head")
    _, idle = trained(model, inputs, FusedLoRALinear, lambda layer: layer.lora_B)
    assert idle <= set(report.without_effect)


@pytest.mark.parametrize("kind", KINDS)
def test_fuse_names_no_layer_that_computes_nothing(kind):
    make, inputs, read = MODELS[kind]
    torch.manual_seed(0)
    base = make()
    names = {n for n, m in base.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    if "mamba" in base.config.model_type:
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            peft.get_peft_model(base, config(names))
        names = {name for name in names if not name.endswith("out_proj")}
    model = peft.get_peft_model(make(), config(names))
    report = fuse(model, verify=inputs)
    assert ends(report.not_fused) == read & ends(names)
    _, idle = trained(model, inputs, Fused, lambda layer: layer.lora_B["default"].weight)
    assert idle <= set(report.not_fused)


def test_a_loss_that_reads_the_heads_weight_is_noticed():
    """As the fused linear cross-entropies of Liger, Unsloth and others do."""

    class Chunked(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None):
            hidden = self.model(input_ids=input_ids).last_hidden_state
            if labels is None:
                return self.lm_head(hidden)
            return nn.functional.cross_entropy((hidden @ self.lm_head.weight.t()).flatten(0, 1), labels.flatten())

    model = Chunked(MODELS["llama"][0]().config)
    report = adapted(copy.deepcopy(model), target_modules=["lm_head", "q_proj"])
    assert list(report.doubted) == ["lm_head"]
    report = adapted(model, target_modules=["lm_head", "q_proj"], verify={"input_ids": IDS, "labels": IDS})
    assert list(report.without_effect) == ["lm_head"]


def test_a_weight_of_torchao_is_refused_at_the_door():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for quant in (None, "nf4"):
        with pytest.raises(TypeError, match="Int8Tensor, which holds other tensors"):
            FusedLoRALinear.from_linear(model[0], quant=quant)
    with pytest.raises(ValueError, match="Int8Tensor, which holds other tensors"):
        apply_lora(model)


def test_timms_fused_qkv_is_in_doubt_and_verify_settles_it():
    timm = pytest.importorskip("timm")
    size = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 3}
    x = torch.randn(2, 3, 32, 32)
    plain = adapted(timm.create_model("vit_tiny_patch16_224", **size), target_modules=["qkv", "fc1"], verify=x)
    assert not plain.doubted and not plain.without_effect
    for name in ("beit_base_patch16_224", "eva_giant_patch14_224"):
        model = timm.create_model(name, **size)
        assert ends(adapted(copy.deepcopy(model), target_modules=["qkv", "fc2"]).doubted) == {"qkv"}
        assert ends(adapted(copy.deepcopy(model), target_modules=["qkv", "fc2"], verify=x).without_effect) == {"qkv"}
        fused = fuse(peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv", "fc2"])), verify=x)
        assert ends(fused.not_fused) == {"qkv"} and ends(fused.fused) == {"fc2"}


def test_open_clips_attention_pool_and_projections():
    model = pytest.importorskip("open_clip.model")
    vision = model.CLIPVisionCfg(layers=(1, 1, 1, 1), width=64, image_size=32, head_width=32)
    text = model.CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    inputs = {"image": torch.randn(2, 3, 32, 32), "text": torch.randint(0, 64, (2, 8))}
    report = adapted(model.CLIP(16, vision, text), verify=inputs)
    read = {name for name, why in report.passed_over.items() if "reads its weight" in why}
    assert ends(read) == {"q_proj", "k_proj", "v_proj", "c_proj"} and not report.without_effect


def test_fusing_the_projections_of_diffusers_after_the_adapter_is_noticed():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3),
    }  # fmt: skip
    report = adapted(model, target_modules=["to_q", "to_k", "to_v", "to_out.0"], verify=inputs)
    assert not report.without_effect
    model.fuse_qkv_projections()
    assert ends(report.verify(model, **inputs).without_effect) == {"to_q", "to_k", "to_v"}
