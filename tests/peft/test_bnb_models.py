"""A Llama quantised by transformers with bitsandbytes trains on the fused path as it does on PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from support.peft_models import fused_layers  # noqa: E402

import lora_kernels  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, with which transformers loads quantised models, is missing")
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("llama"))
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            initializer_range=0.1,
        )
    ).save_pretrained(path)
    return path


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, "int8"])
def test_a_quantised_llama_trains_as_it_does_unfused(checkpoint, compute):
    """The recipe is QLoRA's: nf4 with double quantisation, gradient checkpointing and AdamW; bf16 under autocast."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=compute != "int8",
        load_in_8bit=compute == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute if compute != "int8" else None,
    )
    base = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantisation, device_map={"": "cpu"})
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.randint(64, (4, 12))

    def losses(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        values = []
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    plain = copy.deepcopy(model)
    report = lora_kernels.fuse(model, strict=True)
    stored = [layer.base_layer.weight.data.clone() for layer in fused_layers(model)]
    got, want = losses(model), losses(plain)
    assert len(report.fused) == 7 and all(
        layer.fused_calls == 8 and not layer.passed_over for layer in fused_layers(model)
    )
    assert got == pytest.approx(want, rel=1e-2 if compute == torch.bfloat16 else 1e-4) and got[-1] < got[0]
    assert all(torch.equal(layer.base_layer.weight, w) for layer, w in zip(fused_layers(model), stored, strict=True))
