"""vLLM's engine with the plug-in gives the tokens that transformers gives with merged weights. Skipped without vLLM for
CPUs, and where lora_kernels is not installed, because vLLM finds the plug-in by its entry point."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import vllm_child

pytest.importorskip("vllm", reason="vLLM is not installed")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
platforms = pytest.importorskip("vllm.platforms")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not platforms.current_platform.is_cpu(), reason="vLLM's platform here is no CPU"),
    pytest.mark.skipif(
        "lora_kernels" not in importlib.metadata.entry_points(group="vllm.general_plugins").names,
        reason="lora_kernels is not installed with its entry point",
    ),
]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS = (8, 16, 3)
WHO = (0, None, 1, 2, 0, None)
"""The adapter of each prompt."""


def adapter(folder: Path, model: torch.nn.Module, R: int) -> dict[str, torch.Tensor]:
    """Write an adapter of random weights for every linear layer of the blocks. Return s · B A by layer."""
    tensors, change = {}, {}
    for name, layer in model.named_modules():
        if name.rsplit(".", 1)[-1] in TARGETS:
            a = torch.randn(R, layer.in_features) * layer.in_features**-0.5
            b = torch.randn(layer.out_features, R) * 0.05
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            change[f"{name}.weight"] = 2.0 * b @ a
    folder.mkdir()
    safetensors.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": 2 * R, "target_modules": TARGETS}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "lora_dropout": 0.0}))
    return change


@pytest.mark.parametrize("slots", [3, 2])  # without a slot to spare, and with one too few
def test_a_mixed_batch_gives_the_tokens_of_merged_weights(tmp_path, slots):
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=256, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    folders = [tmp_path / f"adapter{i}" for i in range(len(RANKS))]
    changes = [adapter(folder, model, R) for folder, R in zip(folders, RANKS, strict=True)]
    prompts = [torch.randint(3, 256, (n,)) for n in (12, 7, 20, 5, 3, 30)]

    base = {name: t.clone() for name, t in model.state_dict().items()}
    want = []
    for prompt, who in zip(prompts, WHO, strict=True):
        change = changes[who] if who is not None else {}
        model.load_state_dict({name: t + change.get(name, 0) for name, t in base.items()})
        tokens = model.generate(
            prompt[None], max_new_tokens=vllm_child.TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        want.append(tokens[0, len(prompt) :].tolist())

    told = {
        "model": str(tmp_path / "model"), "slots": slots, "rounds": 2, "prompts": [each.tolist() for each in prompts],
        "adapters": [None if who is None else str(folders[who]) for who in WHO],
    }  # fmt: skip
    command = [sys.executable, vllm_child.__file__, json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Using LoRAKernelsPunicaWrapper" in done.stdout + done.stderr
    (served,) = [line for line in done.stdout.splitlines() if line.startswith("SERVED")]
    assert json.loads(served.removeprefix("SERVED")) == [want, want]
