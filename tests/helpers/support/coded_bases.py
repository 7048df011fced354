"""Quantised layers of other packages, with the weight that they stand for, and PEFT's layers over them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig
from torch import nn

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Kind(NamedTuple):
    """A kind of base."""

    make: Callable[[int, int, torch.dtype, bool], nn.Module]
    """Returns a layer for (K, N, dtype, bias)."""
    dense: Callable[[nn.Module], torch.Tensor]
    """Returns W [N, K] in fp64, by the package's own way back or by its definition."""
    peft: tuple[str, str]
    """The module and name of PEFT's class."""
    note: str
    """What the report says."""


class TorchLinear(nn.Module):
    """A layer in GPTQ's format, which multiplies as gptqmodel's layer of this name does."""

    def __init__(self, K, N, dtype, bias, bits=4, group_size=32, act_order=False) -> None:
        super().__init__()
        per_word = 32 // bits
        self.in_features, self.out_features, self.bits, self.group_size = K, N, bits, group_size
        groups = -(-K // group_size)
        self.register_buffer("qweight", words(K // per_word, N))
        self.register_buffer("qzeros", words(groups, N // per_word))
        self.register_buffer("scales", (torch.rand(groups, N) / 50 + 0.005).to(torch.float16))
        order = torch.arange(K) // group_size
        self.register_buffer("g_idx", (order[torch.randperm(K)] if act_order else order).to(torch.int32))
        self.register_buffer("bias", torch.randn(N).to(torch.float16) if bias else None)

    def dequantize_weight(self):
        bits, mask = self.bits, 2**self.bits - 1
        shifts = torch.arange(0, 32, bits)
        q = (self.qweight[:, None, :] >> shifts[None, :, None] & mask).reshape(self.in_features, self.out_features)
        zeros = (self.qzeros[:, :, None] >> shifts & mask).reshape(self.scales.shape)
        group = self.g_idx.long()
        return self.scales[group] * (q - zeros[group])

    def forward(self, x):
        y = torch.matmul(x, self.dequantize_weight().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class AwqTorchLinear(nn.Module):
    """A layer in AWQ's format, which multiplies as gptqmodel's layer of this name does, but for an fp32 x in fp32."""

    def __init__(self, K, N, dtype, bias) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = K, N, 4, 32
        self.register_buffer("qweight", words(K, N // 8))
        self.register_buffer("qzeros", words(-(-K // 32), N // 8))
        self.register_buffer("scales", (torch.rand(-(-K // 32), N) / 50 + 0.005).to(torch.float16))
        self.register_buffer("bias", torch.randn(N).to(torch.float16) if bias else None)

    def dequantize_weight(self):
        place = torch.tensor([AWQ_ORDER.index(n) for n in range(8)])
        q, zeros = ((t[:, :, None] >> 4 * place & 15).flatten(1) for t in (self.qweight, self.qzeros))
        group = torch.arange(self.in_features) // self.group_size
        return self.scales[group] * (q - zeros[group])

    def forward(self, x):
        return TorchLinear.forward(self, x).to(x.dtype)


for _kind in (TorchLinear, AwqTorchLinear):
    _kind.__module__ = _kind.forward.__module__ = "gptqmodel.nn_modules.qlinear.stand_in"


def words(*shape):
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def linear(K, N, dtype, bias):
    return nn.Linear(K, N, bias=bias, dtype=dtype).requires_grad_(False)


def torchao(config, **kwargs):
    def make(K, N, dtype, bias):
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        granularity = importlib.import_module("torchao.quantization.granularity")
        given = dict(kwargs)
        if by := kwargs.get("granularity"):
            given["granularity"] = getattr(granularity, by[0])(*by[1:])
        if config == "IntxWeightOnlyConfig":
            given["mapping_type"] = quantization.MappingType.ASYMMETRIC
        holder = nn.Sequential(linear(K, N, dtype, bias))
        quantization.quantize_(holder, getattr(quantization, config)(**given))
        return holder[0]

    return make


def nf4(K, N, dtype, bias):
    pytest.importorskip("torchao", reason="torchao is not installed")
    module = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    base = linear(K, N, dtype, bias)
    base.weight = nn.Parameter(module.to_nf4(base.weight.data, 64, 4 if K * N % 2**14 else 256), requires_grad=False)
    return base


def nf4_dense(base):
    w = base.weight
    scales = w.dequantize_scalers(w.quantized_scalers, w.quantization_factor, w.scaler_block_size).double()
    codes = torch.stack((w.quantized_data >> 4, w.quantized_data & 15), -1).long()
    return (w.nf4.double()[codes].view(-1, w.block_size) * scales[:, None]).view(w.shape)


def hqq(bits, group=64, axis=1):
    def make(K, N, dtype, bias):
        module = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
        module.HQQLinear.set_backend(module.HQQBackend.PYTORCH)
        config = module.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
        return module.HQQLinear(linear(K, N, torch.float32, bias), config, compute_dtype=dtype, device="cpu")

    return make


TORCHAO = ("torchao", "TorchaoLoraLinear")
KINDS = {
    "int8 by rows": Kind(
        torchao("Int8WeightOnlyConfig"), lambda b: b.weight.dequantize(torch.float32).double(), TORCHAO, "int8 by rows"
    ),
    "int8 per tensor": Kind(
        torchao("Int8WeightOnlyConfig", granularity=("PerTensor",)),
        lambda b: b.weight.dequantize(torch.float32).double(),
        TORCHAO,
        "Int8Tensor, int8",
    ),
    "int8 in groups": Kind(
        torchao("Int8WeightOnlyConfig", granularity=("PerGroup", 32)),
        lambda b: b.weight.dequantize(torch.float32).double(),
        TORCHAO,
        "int8 in groups of 32",
    ),
    "int4 with zeros": Kind(
        torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=("PerGroup", 32)),
        lambda b: b.weight.dequantize().double(),
        TORCHAO,
        "int8 in groups of 32",
    ),
    "e4m3": Kind(
        torchao("Float8WeightOnlyConfig"),
        lambda b: b.weight.qdata.double() * b.weight.scale.double(),
        TORCHAO,
        "e4m3",
    ),
    "NF4Tensor": Kind(nf4, nf4_dense, ("layer", "Linear"), "NF4Tensor, nf4, and its scales again in fp32, 0 KB"),
    "hqq 4": Kind(hqq(4), lambda b: b.dequantize().double(), ("hqq", "HqqLoraLinear"), "HQQ, 4 bits"),
    "hqq 8": Kind(hqq(8, 16), lambda b: b.dequantize().double(), ("hqq", "HqqLoraLinear"), "HQQ, 8 bits"),
    "gptq 4": Kind(
        TorchLinear, lambda b: b.dequantize_weight().t().double(), ("gptq", "GPTQLoraLinear"), "GPTQ, 4 bits"
    ),
    "gptq 4 act-order": Kind(
        lambda *args: TorchLinear(*args, act_order=True),
        lambda b: b.dequantize_weight().t().double(),
        ("gptq", "GPTQLoraLinear"),
        "GPTQ, 4 bits, act-order",
    ),
    "gptq 8": Kind(
        lambda *args: TorchLinear(*args, bits=8),
        lambda b: b.dequantize_weight().t().double(),
        ("gptq", "GPTQLoraLinear"),
        "GPTQ, 8 bits",
    ),
    "awq 4": Kind(
        AwqTorchLinear, lambda b: b.dequantize_weight().t().double(), ("awq", "AwqLoraLinear"), "AWQ, 4 bits"
    ),
}


def layer_over(base: nn.Module, kind: Kind, r: int = 8, adapter_dtype=torch.float32, **kwargs) -> nn.Module:
    """Return PEFT's layer of `kind` over `base`, with an adapter that differs from zero."""
    if kind.peft[0] == "hqq":
        pytest.importorskip("hqq", reason="hqq is not installed")
    cls = getattr(importlib.import_module(f"peft.tuners.lora.{kind.peft[0]}"), kind.peft[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's merge needs what a model of transformers has
        config = LoraConfig(r=r, lora_alpha=6, **kwargs)
        layer = cls(base, "default", config=config, r=r, lora_alpha=6)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3 if "lora_B" in name else p.shape[-1] ** -0.5)
                p.data = p.data.to(adapter_dtype)
    return layer


def make(name: str, K: int = 96, N: int = 64, dtype=torch.float32, bias: bool = True, **kwargs) -> nn.Module:
    """Return a model of one of PEFT's layers over a base of the kind `name`."""
    torch.manual_seed(0)
    kind = KINDS[name]
    return nn.Sequential(layer_over(kind.make(K, N, dtype, bias), kind, **kwargs))
