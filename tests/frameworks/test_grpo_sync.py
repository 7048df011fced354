"""TRL's GRPO sends merged weights to vLLM in every step: they are the sums rounded once, and W keeps every bit."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch

for package in ("peft", "transformers", "trl", "datasets"):
    pytest.importorskip(package, reason=f"{package} is not installed")
from support.merge_models import is_rounded_once  # noqa: E402
from support.tiny_llama import llama  # noqa: E402

import lora_kernels  # noqa: E402

pytestmark = pytest.mark.slow
WORDS = {f"w{i}": i for i in range(62)} | {"<pad>": 62, "<eos>": 63}


class Client:
    """A stand-in for the client of a server of vLLM, which keeps what it receives."""

    def __init__(self, **_: Any) -> None:
        self.received: list[dict[str, torch.Tensor]] = []
        self.metadata: list[Any] = []

    def init_communicator(self, **_: Any) -> None: ...

    def reset_prefix_cache(self) -> None: ...

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata: Any, params: Any) -> None:
        self.metadata = metadata
        self.received.append({name: param.detach().clone() for name, param in params})

    def generate(self, prompts: list[list[int]], n: int, max_tokens: int, **_: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(len(self.received))
        rows = [torch.randint(0, 60, (max_tokens,), generator=generator).tolist() for _ in range(n * len(prompts))]
        return {"prompt_ids": prompts, "completion_ids": rows, "logprobs": [[[-4.0]] * max_tokens for _ in rows]}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def base_of(kind: str):
    if kind == "bf16":
        return llama().to(torch.bfloat16)
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_vllm_gets_the_sums_rounded_once_and_the_base_keeps_its_bits(kind, monkeypatch, tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer
    from trl.generation import vllm_generation

    client = Client()
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(vllm_generation, "VLLMClient", lambda **kwargs: client)
    model = base_of(kind)
    lora_kernels.enable()
    try:
        trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [sum(map(ord, each)) / 1e3 for each in completions],
            args=GRPOConfig(
                output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2, use_cpu=True,
                max_completion_length=6, learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True,
                bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False, use_vllm=True,
                vllm_mode="server", vllm_importance_sampling_correction=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(16)]),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip
    finally:
        lora_kernels.disable()
    peft_model = trainer.model
    layers = {name: layer for name, layer in peft_model.named_modules() if hasattr(layer, "_kept_base")}
    assert len(layers) == 14
    before = {name: (layer.base_layer, layer.base_layer.weight.detach().clone()) for name, layer in layers.items()}
    trainer.train()
    assert len(client.received) == 2 and [name for name, *_ in client.metadata] == list(client.received[-1])
    assert set(client.received[-1]) == {name for name, _ in llama().named_parameters()}
    for name, layer in layers.items():
        base, bits = before[name]
        assert layer.base_layer is base and torch.equal(layer.base_layer.weight, bits) and not layer.merged
    trainer.vllm_generation.sync_weights()
    for name, layer in layers.items():
        base, bits = before[name]
        assert layer.base_layer is base and torch.equal(layer.base_layer.weight, bits)
        w = exact_base(layer)
        a, b = (getattr(layer, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
        assert b.abs().max() > 0
        got = client.received[-1][name.removeprefix("base_model.model.") + ".weight"]
        assert is_rounded_once(got, w + layer.scaling["default"] * (b @ a)), name
        assert not torch.equal(got, client.received[0][name.removeprefix("base_model.model.") + ".weight"])


def exact_base(layer) -> torch.Tensor:
    """Return W in fp64, of codes as they stand for it."""
    weight = layer.base_layer.weight
    if not hasattr(weight, "quant_state"):
        return weight.detach().double()
    from lora_kernels.quant.bnb import from_bnb

    return from_bnb(layer.base_layer).dequantize(torch.float32).double()
