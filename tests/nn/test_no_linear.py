"""Code that finds an nn.Linear may rebuild it from its weight and bias. Our layers are none, so such code refuses them
or leaves them alone, and the adapter stays."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lora_kernels import FusedLoRALinear, apply_lora


def trained(**settings) -> FusedLoRALinear:
    layer = FusedLoRALinear.from_linear(nn.Linear(64, 32), r=4, **settings)
    nn.init.normal_(layer.lora_B)
    return layer


def llama(**config) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **config)).eval()


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_the_layers_are_called_as_an_nn_linear_and_are_none(quant):
    layer, x = trained(quant=quant), torch.randn(3, 64)
    assert not isinstance(layer, nn.Linear)
    assert torch.equal(layer(input=x), layer(x))
    assert (layer.in_features, layer.out_features, layer.bias.shape) == (64, 32, (32,))
    assert "in_features=64, out_features=32, bias=True" in repr(layer)


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_resized_model_refuses_its_adapted_head(quant):
    model, ids = llama(), torch.arange(5)[None]
    apply_lora(model, r=4, target_modules=["lm_head"], quant=quant)
    nn.init.normal_(model.lm_head.lora_B)
    want = model(input_ids=ids).logits
    with pytest.raises(TypeError, match=r"FusedLoRALinear|QuantizedLoRALinear"):
        model.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(model.lm_head(model.model(input_ids=ids).last_hidden_state), want)


def test_initialising_the_model_again_leaves_a_frozen_weight_alone():
    model = llama()
    apply_lora(model, r=4)
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.weight.clone()
    model.apply(model._init_weights)
    assert torch.equal(layer.weight, before)


def test_peft_refuses_to_wrap_a_layer_that_has_an_adapter():
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"FusedLoRALinear.* is not supported"):
        peft.get_peft_model(nn.Sequential(trained()), peft.LoraConfig(target_modules=["0"]))
    model = nn.ModuleDict({"ours": trained(), "theirs": nn.Linear(4, 4)})
    assert peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).targeted_module_names == ["theirs"]


def test_torchs_quantisation_passes_the_layer_over():
    model = nn.Sequential(trained())
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    assert type(model[0]) is FusedLoRALinear


@pytest.mark.parametrize("change", [parametrizations.spectral_norm, parametrizations.weight_norm, prune.identity])
def test_a_parametrised_weight_is_read_as_it_is_computed(change):
    layer, x = trained().eval(), torch.randn(3, 64)
    change(layer, "weight")
    update = layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight + update, layer.bias))


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8", "fp8"])
def test_an_x_in_the_dtype_of_the_codes_is_refused_with_the_way_out(quant):
    """Wav2Vec2's project_q and xLSTM's head convert x to the dtype of a weight, whatever it is."""
    layer, x = trained(quant=quant), torch.randn(3, 64)
    assert layer.weight.dtype == torch.int8
    with pytest.raises(TypeError, match=r"dtype of a quantised layer's codes: take layer\.weight_dtype"):
        layer(x.to(layer.weight.dtype))
    assert torch.equal(layer(x.to(layer.weight_dtype)), layer(x))


def test_apply_lora_warns_of_a_model_that_converts_x_to_the_dtype_of_quantised_codes():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(64, 32)

        def forward(self, x):
            return self.proj(x.to(self.proj.weight.dtype))

    with pytest.warns(UserWarning, match=r"proj.*Head.forward may convert x to the dtype of its weight"):
        apply_lora(Head(), r=4, quant="nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora(Head(), r=4)


@pytest.mark.parametrize("quant", ["nf4", "fp4", "fp8", "int8"])
def test_t5_computes_the_same_with_quantised_layers(quant):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(
        **sizes, feed_forward_proj="gated-gelu", pad_token_id=0, decoder_start_token_id=0, dropout_rate=0.0
    )
    model, ids = transformers.T5ForConditionalGeneration(config).eval(), torch.randint(1, 64, (2, 8))
    want = model(input_ids=ids, labels=ids).loss
    apply_lora(model, r=4, quant=quant)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, want, rtol=0.05, atol=0)


def test_no_parameter_takes_the_place_of_a_quantised_weight():
    layer = trained(quant="nf4")
    with pytest.raises(TypeError, match=r"stored in nf4.*load_state_dict"):
        layer.weight = nn.Parameter(torch.randn(32, 64))
    assert layer.quantized_weight().format == "nf4"
