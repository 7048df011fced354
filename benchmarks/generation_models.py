"""The models of `benchmarks.generation`: one Llama with one set of adapters, built in several ways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels.nn.quantized import QuantizedLoRALinear
from lora_kernels.quant.bnb import from_bnb
from lora_kernels.testing.names import SHORT

PEER, FUSED, OURS, DENSE = "PEFT + bitsandbytes", "PEFT + bitsandbytes, fused", 'apply_lora(quant="nf4")', "PEFT, dense"
SCALE = 2.0
"""lora_alpha / r"""


@dataclass(frozen=True)
class Size:
    """The size of the model, its prompt and its output."""

    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 4
    heads: int = 16
    vocabulary: int = 4096
    r: int = 16
    prompt: int = 16
    """Tokens of the prompt."""
    new: int = 32
    """Tokens to generate."""


@dataclass
class Variant:
    """A model that is timed."""

    name: str
    model: Any
    weight_bytes: int
    ours: bool
    dtype: torch.dtype


class Models:
    """Builds the variants from one checkpoint. `apply` comes first: it fixes the weights and adapters of all others."""

    def __init__(self, path: str, size: Size, double_quant: bool) -> None:
        self.path, self.size, self.double_quant = path, size, double_quant
        self.weights: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        """By layer: W dequantised from nf4 in fp32, A and B."""
        save_model(size, path)

    def apply(self, dtype: torch.dtype) -> Variant:
        """Return a plain model after `lora_kernels.apply_lora`."""
        model, total, generator = self._load(dtype), 0, seeded()
        # PEFT's adapters are fp32 too.
        settings: dict[str, Any] = {"r": self.size.r, "lora_alpha": SCALE * self.size.r, "adapter_dtype": torch.float32}
        lora_kernels.apply_lora(model, quant="nf4", double_quant=self.double_quant, **settings)
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLoRALinear):
                self.weights[name] = _draw(layer, self.size.r, generator)
                total += _bytes(layer.quantized_weight().tensors)
                _put(layer.lora_A, layer.lora_B, self.weights[name])
        return Variant(f"{OURS} {SHORT[dtype]}", model.eval(), total, True, dtype)

    def dense(self, dtype: torch.dtype) -> Variant:
        """Return PEFT over dense weights that have the values of the nf4 weights."""
        model, total = self._load(dtype), 0
        with torch.no_grad():
            for name, (w, _, _) in self.weights.items():
                dense = model.get_submodule(name).weight
                dense.copy_(w)
                total += dense.nbytes
        return Variant(f"{DENSE} {SHORT[dtype]}", self._adapted(model), total, False, dtype)

    def over_bnb(self, dtype: torch.dtype, fused: bool) -> Variant:
        """Return PEFT over bitsandbytes. Each variant loads its own model: on some processors the first call re-packs
        the weights."""
        from transformers import BitsAndBytesConfig

        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        config = BitsAndBytesConfig(**nf4, bnb_4bit_use_double_quant=self.double_quant)
        model = self._load(dtype, quantization_config=config, device_map={"": "cpu"})
        total = sum(_bytes(from_bnb(model.get_submodule(name)).tensors) for name in self.weights)
        model = self._adapted(model)
        if fused:
            lora_kernels.fuse(model, strict=True)
        return Variant(f"{FUSED if fused else PEER} {SHORT[dtype]}", model, total, fused, dtype)

    @torch.no_grad()
    def exact(self) -> nn.Module:
        """Return the model in fp64 with W + s·B·A in place of W. (transformers computes its norms in fp32
        nevertheless.)"""
        model: nn.Module = self._load(torch.float64)
        for name, (w, a, b) in self.weights.items():
            dense: Any = model.get_submodule(name).weight
            dense.copy_(w).addmm_(b.double(), a.double(), alpha=SCALE)
        return model

    def _load(self, dtype: torch.dtype, **more: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype, **more).eval()

    def _adapted(self, base: Any) -> nn.Module:
        """Return the model with PEFT's LoRA."""
        from peft import LoraConfig, get_peft_model

        alpha: Any = SCALE * self.size.r  # its type is int there, but it is used as a float
        config = LoraConfig(r=self.size.r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        for name, parts in self.weights.items():
            layer: Any = base.get_submodule(name)
            _put(layer.lora_A["default"].weight, layer.lora_B["default"].weight, parts)
        return model.eval()


def seeded() -> torch.Generator:
    """Return a generator whose numbers are the same in every run."""
    return torch.Generator().manual_seed(0)


def _draw(layer: QuantizedLoRALinear, R: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return W of `layer` in fp32, and an A and a B such that s·B·A is about half as large as W."""
    w = layer.quantized_weight().dequantize(torch.float32)
    N, K = w.shape
    a = torch.randn(R, K, generator=generator) / math.sqrt(K)
    b = torch.randn(N, R, generator=generator) * (0.5 / (SCALE * math.sqrt(R)))
    return w, a, b


def save_model(size: Size, path: str) -> None:
    """Save a random model in bf16, so that every dtype starts from the same numbers. No token ends the text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        vocab_size=size.vocabulary,
        initializer_range=1 / math.sqrt(size.hidden),  # keeps the size of vectors from layer to layer
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(path)


@torch.no_grad()
def _put(a: Tensor, b: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> None:
    a.copy_(parts[1])
    b.copy_(parts[2])


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.nbytes for t in tensors)
