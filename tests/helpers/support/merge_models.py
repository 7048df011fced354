"""A small model of PEFT for each kind of layer that can be merged, with the merged weights that PEFT gives in fp64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from support import fold_models, peft_experts
from torch import Tensor, nn

K, N = 64, 96


class Net(nn.Module):
    """A model that is one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return self.layer(*args)


def _lora(layer: nn.Module, **settings: Any) -> Any:
    target = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"]} | settings
    return get_peft_model(Net(layer), LoraConfig(**target))


def _linear(dtype: torch.dtype, **settings: Any) -> tuple[Any, tuple[Tensor, ...]]:
    return _lora(nn.Linear(K, N, dtype=dtype), **settings), (torch.randn(3, K, dtype=dtype),)


def _conv1d(dtype: torch.dtype, **settings: Any) -> tuple[Any, tuple[Tensor, ...]]:
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    return _lora(conv1d(N, K).to(dtype), fan_in_fan_out=True, **settings), (torch.randn(3, K, dtype=dtype),)


def _conv(dtype: torch.dtype, dims: int = 2, last: bool = False, **settings: Any) -> tuple[Any, tuple[Tensor, ...]]:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv, x = kind(5, 7, 3, dtype=dtype), torch.randn(2, 5, *([6] * dims), dtype=dtype)
    if last:
        conv, x = conv.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return _lora(conv, **settings), (x,)


def _embedding(dtype: torch.dtype, **settings: Any) -> tuple[Any, tuple[Tensor, ...]]:
    return _lora(nn.Embedding(33, 12, padding_idx=2, dtype=dtype), **settings), (torch.tensor([[1, 2, 30], [4, 0, 5]]),)


def _attention(dtype: torch.dtype, **settings: Any) -> tuple[Any, tuple[Tensor, ...]]:
    x = torch.randn(2, 5, 12, dtype=dtype)
    return _lora(nn.MultiheadAttention(12, 3, batch_first=True, dtype=dtype), **settings), (x, x, x)


def _experts(family: str) -> Callable[..., Any]:
    def make(dtype: torch.dtype, **settings: Any) -> tuple[Any, tuple[Tensor, ...]]:
        from support.experts import inputs

        given = inputs(dtype)
        return peft_experts.wrapped(family, dtype, **settings), (given.x, given.ids, given.weights)

    return make


def _folded(kind: str) -> Callable[..., Any]:
    def make(dtype: torch.dtype, **settings: Any) -> tuple[Any, tuple[Tensor, ...]]:
        if kind == "mica" and dtype != torch.float32:
            pytest.skip("PEFT initialises MiCA in fp32")
        return fold_models.make(kind, dtype), (torch.randn(3, 24, dtype=dtype),)

    return make


def _vera(dtype: torch.dtype, layer: nn.Module | None = None, **settings: Any) -> tuple[Any, tuple[Tensor, ...]]:
    layer = nn.Linear(K, N, dtype=dtype) if layer is None else layer
    model = get_peft_model(Net(layer), peft.VeraConfig(r=8, target_modules=["layer"], **settings))
    return model, (torch.randn(3, K, dtype=dtype),)


class OwnForward(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def _around(dtype: torch.dtype, **settings: Any) -> tuple[Any, tuple[Tensor, ...]]:
    return _lora(OwnForward(K, N, dtype=dtype), **settings), (torch.randn(3, K, dtype=dtype),)


DENSE: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "linear with lora_bias": lambda dtype, **kw: _linear(dtype, lora_bias=True, **kw),
    "rslora": lambda dtype, **kw: _linear(dtype, use_rslora=True, **kw),
    "dora": lambda dtype, **kw: _linear(dtype, use_dora=True, **kw),
    "Conv1D": _conv1d,
    "Conv1D dora": lambda dtype, **kw: _conv1d(dtype, use_dora=True, **kw),
    "conv1d": lambda dtype, **kw: _conv(dtype, 1, **kw),
    "conv2d": _conv,
    "conv2d in channels_last": lambda dtype, **kw: _conv(dtype, last=True, **kw),
    "conv2d dora": lambda dtype, **kw: _conv(dtype, use_dora=True, **kw),
    "conv3d": lambda dtype, **kw: _conv(dtype, 3, **kw),
    "embedding": _embedding,
    "embedding dora": lambda dtype, **kw: _embedding(dtype, use_dora=True, **kw),
    "attention": _attention,
    "experts": _experts("Qwen3Moe"),
    "experts stored transposed": _experts("GptOss"),
    "around": _around,
    "vera": _vera,
} | {kind: _folded(kind) for kind in fold_models.KINDS}
"""The kinds over dense weights, each a function of the dtype of W and of settings of the configuration."""


def quantised(format: str, dtype: torch.dtype = torch.float32, bias: bool = True, nested: bool = False) -> nn.Module:
    """Return a layer of bitsandbytes, quantised on the CPU, which computes in `dtype`."""
    bnb = pytest.importorskip("bitsandbytes")
    if format == "int8":
        layer: nn.Module = bnb.nn.Linear8bitLt(K, N, bias, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(K, N, bias, compute_dtype=dtype, quant_type=format, compress_statistics=nested)
    layer = layer.to("cpu")
    if bias:
        layer.bias.data = layer.bias.data.to(dtype)
    return layer


def over(format: str, dtype: torch.dtype = torch.float32, nested: bool = False, **settings: Any) -> Any:
    """Return a model of PEFT over a layer of bitsandbytes."""
    net = Net(quantised(format, dtype, nested=nested))
    setattr(net, "is_loaded_in_8bit" if format == "int8" else "is_loaded_in_4bit", True)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"]} | settings
    return randomised(get_peft_model(net, LoraConfig(**config)))


def randomised(model: Any, seed: int = 1) -> Any:
    """Make every adapter differ from zero, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            part = any(each in name for each in ("lora_", "vera_lambda", "delora_"))
            if part and "magnitude" not in name and "embedding_A" not in name and "ranknum" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
            elif "embedding_A" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
                p.data[:, 2] = 0  # padding_idx, to which PEFT gives no gradient
    return model.eval()


def make(kind: str, dtype: torch.dtype, **settings: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """Return a model of PEFT over a dense base, in evaluation mode, and inputs."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, given = DENSE[kind](dtype, **settings)
    return randomised(model), given


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of the base layers by name: the objects themselves."""
    adapters = ("lora_", "vera_", "delora_", "ranknum")
    return {name: p for name, p in model.named_parameters() if not any(part in name for part in adapters)}


def merged_by_peft(model: Any, *names: str) -> dict[str, Tensor]:
    """Return the base weights that PEFT's own merge gives in fp64, for a model that is not fused."""
    model = copy.deepcopy(model).double()
    for layer in layers_of(model):
        if hasattr(layer, "delora_w_norm"):
            layer.delora_w_norm.data = {k: v.double() for k, v in layer.delora_w_norm.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(list(names) or None)
    return {name: t.detach() for name, t in base_weights(model).items()}


def is_rounded_once(got: Tensor, exact: Tensor) -> bool:
    """Return whether `got` is `exact`, in fp64, rounded to the dtype of `got`: but for elements that lie so near to the
    middle between two numbers that a sum in fp32 may go to the other."""
    want = exact.to(got.dtype)
    if got.dtype == torch.float32:
        return bool(torch.allclose(got, want, rtol=1e-6, atol=1e-7))
    step = want.abs().clamp(min=1e-4) * torch.finfo(got.dtype).eps
    different = got != want
    return bool((got.double() - exact).abs().le(step * 0.51 + 1e-7).all()) and different.float().mean().item() < 0.02
