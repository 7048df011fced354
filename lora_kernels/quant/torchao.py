"""The weights that torchao quantises, as `QuantizedWeight`: int8, integers of up to 8 bits, e4m3, and NF4Tensor.

    Int8Tensor, IntxUnpackedToInt8Tensor   int8-group, a scale per tensor, row or group, and zeros if there are any
    Float8Tensor                           fp8, with a scale per tensor, row or 128 x 128
    NF4Tensor                              nf4 with its own 16 levels; its scales, which it stores in 8 bits, are a copy

torchao itself is not imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.quant import tables
from lora_kernels.quant.integers import Integers
from lora_kernels.quant.reader import Facts, Reader, nothing, require
from lora_kernels.quant.weight import BLOCKSIZES, DTYPES, QuantizedWeight

_TENSORS = {
    "Int8Tensor": ("qdata", "scale", "zero_point"),
    "IntxUnpackedToInt8Tensor": ("qdata", "scale", "zero_point"),
    "Float8Tensor": ("qdata", "scale"),
    "NF4Tensor": ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean", "nf4"),
}
"""The kinds of tensors that are read, and their parts."""
_CHANGES_X = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")
"""The attributes of a tensor whose layer quantises or scales x too."""


class Torchao(Reader):
    """Reads an nn.Linear whose weight is a tensor of torchao."""

    def sources(self, base: Any) -> tuple[Tensor, ...]:
        """Return the parts of the weight."""
        weight = base._parameters.get("weight")
        kind = type(weight)
        names = _TENSORS.get(kind.__name__) if kind.__module__.startswith("torchao.") else None
        require(names is not None, f"its weight is a {kind.__name__}, for which the kernels have no format")
        parts = (getattr(weight, name, None) for name in names or ())
        return tuple(part for part in parts if part is not None)

    def values(self, base: Any) -> tuple[Tensor, ...]:
        """Return the zeros, or the parts of NF4Tensor's scales."""
        weight = base._parameters["weight"]
        if type(weight).__name__ == "NF4Tensor":
            return weight.quantized_scalers, weight.quantization_factor, weight.scaler_mean
        zeros = getattr(weight, "zero_point", None)
        return () if zeros is None else (zeros,)

    def facts(self, base: Any) -> Facts:
        """Return the format of the weight, and for NF4Tensor its scales in fp32."""
        weight = base._parameters["weight"]
        for name in _CHANGES_X:
            require(
                getattr(weight, name, None) is None, f"its weight has {name}: the layer changes x before the product"
            )
        dtype, shape = weight.dtype, tuple(weight.shape)
        require(dtype in DTYPES and len(shape) == 2, f"its weight is {dtype}, {shape}")
        read = {"NF4Tensor": _nf4, "Float8Tensor": _fp8}.get(type(weight).__name__, _integers)
        facts = read(weight, (shape[0], shape[1]))
        return facts._replace(note=f"{type(weight).__name__}, {facts.note}")

    def weight(self, base: Any, facts: Facts) -> QuantizedWeight:
        """Return the weight over torchao's codes."""
        w = base._parameters["weight"]
        if facts.format in tables.LEVELS:
            codes = w.quantized_data.view(facts.shape[0], facts.shape[1] // 2)
            return QuantizedWeight(facts.format, facts.shape, facts.dtype, codes, facts.copies[0], facts.blocksize)
        codes, scale = w.qdata, w.scale
        if facts.format == "fp8":
            return QuantizedWeight("fp8", facts.shape, facts.dtype, codes, scale)
        zeros, order = facts.copies
        if zeros.numel():  # it only says that there are some
            zeros = w.zero_point.view(-1)
        parts = Integers(zeros, order)
        return QuantizedWeight(
            "int8-group", facts.shape, facts.dtype, codes, scale.view(-1), facts.blocksize, integers=parts
        )


def _integers(w: Any, shape: tuple[int, int]) -> Facts:
    (N, K), (rows, columns) = shape, tuple(w.block_size)
    require(w.qdata.dtype == torch.int8 and w.qdata.is_contiguous(), f"its codes are {w.qdata.dtype}, or have strides")
    whole = rows * columns == N * K
    require(whole or (rows == 1 and K % columns == 0), f"its scales are for blocks of {rows} x {columns}")
    require(w.scale.is_contiguous() and w.scale.numel() == N * K // (rows * columns), "its scales have another layout")
    require(w.scale.dtype in DTYPES, f"its scales are {w.scale.dtype}")
    zeros, empty = getattr(w, "zero_point", None), nothing(w.qdata)
    if zeros is not None and bool((zeros != 0).any()):
        require(
            zeros.numel() == w.scale.numel() and zeros.is_contiguous() and zeros.dtype in (torch.int8, *DTYPES),
            f"its zeros are {zeros.dtype} {tuple(zeros.shape)}",
        )
        empty = w.qdata.new_ones(1)
    note = "int8" if w.scale.numel() == 1 else "int8 by rows" if columns == K else f"int8 in groups of {columns}"
    copies = empty, nothing(w.qdata, torch.int32)
    return Facts("int8-group", shape, w.dtype, rows * columns, copies, note)


def _fp8(w: Any, shape: tuple[int, int]) -> Facts:
    N, K = shape
    kinds = [(1, 1), (N, 1), (-(-N // 128), -(-K // 128))]
    blocks = [(N, K), (1, K), (128, 128)]
    fits = (tuple(w.scale.shape), tuple(w.block_size)) in list(zip(kinds, blocks, strict=True))
    require(fits, f"its scales are {tuple(w.scale.shape)} for blocks of {tuple(w.block_size)}")
    require(w.qdata.dtype == torch.float8_e4m3fn, f"its codes are {w.qdata.dtype}")
    require(w.scale.dtype == torch.float32 and w.scale.is_contiguous() and w.qdata.is_contiguous(), "it has strides")
    return Facts("fp8", shape, w.dtype, note="e4m3")


def _nf4(w: Any, shape: tuple[int, int]) -> Facts:
    N, K = shape
    format = tables.TORCHAO[w.dtype]
    levels = tables.levels(format, w.nf4.device)
    require(torch.equal(w.nf4.float(), levels), f"its table is {w.nf4.tolist()}, not that of NF4Tensor")
    require(
        K % 2 == 0 and w.quantized_data.numel() * 2 == N * K, f"it has {w.quantized_data.numel()} bytes for {shape}"
    )
    require(
        w.block_size in BLOCKSIZES, f"its blocks have {w.block_size} elements, not {', '.join(map(str, BLOCKSIZES))}"
    )
    require(w.quantized_data.is_contiguous(), "its codes have strides")
    with torch.inference_mode(False):
        scales = w.dequantize_scalers(w.quantized_scalers, w.quantization_factor, w.scaler_block_size)
        scales = scales.float().contiguous()
    note = f"nf4, and its scales again in fp32, {scales.nbytes / 1024:.0f} KB"
    return Facts(format, shape, w.dtype, w.block_size, (scales,), note)


TORCHAO = Torchao()
