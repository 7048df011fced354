"""The weights of HQQLinear, as `QuantizedWeight`: 4 and 8 bits in groups along the rows (axis 1).

    w = (code - zero) · scale of its group, each rounded to compute_dtype

Codes, scales and zeros are HQQ's own tensors. hqq itself is not imported.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023
(https://mobiusml.github.io/hqq_blog).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.quant.integers import Integers
from lora_kernels.quant.reader import Facts, Reader, normal, nothing, require
from lora_kernels.quant.weight import DTYPES, QuantizedWeight

_FORMATS = {4: "uint4-group", 8: "uint8-group"}
_PACKING = {4: "4bit_u8", 8: "8bit_u8"}


class Hqq(Reader):
    """Reads an HQQLinear."""

    def sources(self, base: Any) -> tuple[Tensor, ...]:
        """Return W_q, and the scales and zeros of its meta-data."""
        meta: Any = getattr(base, "meta", None)
        require(meta is not None and getattr(base, "W_q", None) is not None, "it is not quantised yet")
        found = base.W_q, meta.get("scale"), meta.get("zero")
        require(all(isinstance(each, Tensor) for each in found), "its scales or zeros are quantised or offloaded")
        return found

    def facts(self, base: Any) -> Facts:
        """Return the format of the weight. It has no copies."""
        codes, scale, zero = self.sources(base)
        meta: dict[str, Any] = base.meta
        N, K = meta["shape"]
        bits, group, dtype = meta["nbits"], meta["group_size"], meta.get("compute_dtype", torch.float16)
        group = K if group is None else group
        require(bits in _FORMATS, f"it has {bits} bits, and the kernels read 4 and 8")
        require(meta["axis"] == 1, f"its groups lie along axis {meta['axis']}, and the kernels read axis 1")
        require(meta["packing"] == _PACKING[bits], f"its codes are packed as {meta['packing']}")
        require(bits == 8 or N % 2 == 0, f"it has an odd number of rows, {N}, in 4 bits")
        require(dtype in DTYPES and scale.dtype == zero.dtype == dtype, f"it computes in {dtype}, scales {scale.dtype}")
        require(scale.numel() == zero.numel() == -(-N * K // group), f"it has {scale.numel()} scales for {(N, K)}")
        require(codes.nbytes == N * K * bits // 8, f"it has {codes.nbytes} bytes of codes for {(N, K)}")
        require(all(each.is_contiguous() for each in (codes, scale, zero)), "its tensors have strides")
        parts = normal(scale).view(-1), normal(zero).view(-1)  # HQQ makes some in inference mode
        own = parts if scale.is_inference() or zero.is_inference() else ()
        return Facts(_FORMATS[bits], (N, K), dtype, group, (nothing(codes, torch.int32), *own), f"HQQ, {bits} bits")

    def weight(self, base: Any, facts: Facts) -> QuantizedWeight:
        """Return the weight over HQQ's codes, scales and zeros."""
        codes, scale, zero = self.sources(base)
        order, *own = facts.copies
        scale, zero = own or (scale.view(-1), zero.view(-1))
        codes, (N, K) = normal(codes), facts.shape
        if codes.dtype != torch.uint8:
            codes = codes.view(torch.uint8)
        codes = codes.view(N // 2 if facts.format == "uint4-group" else N, K)
        parts = Integers(zero, order)
        return QuantizedWeight(facts.format, facts.shape, facts.dtype, codes, scale, facts.blocksize, integers=parts)


HQQ = Hqq()
