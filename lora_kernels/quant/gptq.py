"""The weights of gptqmodel's layers for GPTQ and AWQ, as `QuantizedWeight`: 4 bits, for GPTQ also 8.

    w = (code - zero) · scale of its group, rounded to the dtype of the scales

Codes, scales, packed zeros and GPTQ's order of the columns (act-order) are the layer's own tensors. gptqmodel itself is
not imported. Only its layers in plain torch store their weight so; those for Marlin, ExLlama and others re-pack it.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ", 2022 (arXiv:2210.17323). Lin et al., "AWQ", 2023 (arXiv:2306.00978).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.quant.integers import Integers
from lora_kernels.quant.reader import Facts, Reader, nothing, require
from lora_kernels.quant.weight import DTYPES, QuantizedWeight

_CHANGES_X = ("online_full_had", "online_partial_had")


class _Packed(Reader):
    """Reads a layer with qweight, qzeros and scales."""

    kind: str
    """Its class in gptqmodel."""

    def sources(self, base: Any) -> tuple[Tensor, ...]:
        """Return the tensors of the layer."""
        known = type(base).__name__ == self.kind and type(base).__module__.startswith("gptqmodel.")
        require(known, f"it is a {type(base).__name__}, which stores its weight in a way of its own")
        found = base.qweight, base.qzeros, base.scales
        require(all(isinstance(each, Tensor) for each in found), "it has no weight yet")
        return found

    def facts(self, base: Any) -> Facts:
        """Return the format of the weight."""
        codes, zeros, scales = self.sources(base)[:3]
        N, K, bits = base.out_features, base.in_features, base.bits
        group = K if base.group_size in (-1, None) else base.group_size
        require(not getattr(base, "adapter", None), "it has an adapter of its own")
        require(not any(getattr(base, name, False) for name in _CHANGES_X), "it rotates x before the product")
        require(codes.dtype == zeros.dtype == torch.int32, f"its codes are packed in {codes.dtype}")
        require(scales.dtype in DTYPES, f"its scales are {scales.dtype}")
        require(N % 8 == 0, f"its {N} rows are not a multiple of 8")
        require(all(each.is_contiguous() for each in (codes, zeros, scales)), "its tensors have strides")
        per_word = 32 // bits
        require(tuple(scales.shape[1:]) == (N,), f"its scales are {tuple(scales.shape)} for {(N, K)}")
        require(tuple(zeros.shape) == (scales.shape[0], N // per_word), f"its zeros are {tuple(zeros.shape)}")
        return Facts("", (N, K), scales.dtype, group)

    def weight(self, base: Any, facts: Facts) -> QuantizedWeight:
        """Return the weight over the codes, scales and zeros of the layer."""
        order = base.g_idx if not facts.copies else facts.copies[0]
        parts = Integers(base.qzeros, order)
        return QuantizedWeight(
            facts.format, facts.shape, base.scales.dtype, base.qweight, base.scales, facts.blocksize, integers=parts
        )


class Gptq(_Packed):
    """Reads a TorchLinear of gptqmodel."""

    kind = "TorchLinear"

    def sources(self, base: Any) -> tuple[Tensor, ...]:
        """Return the tensors of the layer, the groups of its columns among them."""
        return *super().sources(base), base.g_idx

    def values(self, base: Any) -> tuple[Tensor, ...]:
        """Return the groups of the columns."""
        return (base.g_idx,)

    def facts(self, base: Any) -> Facts:
        """Return the format of the weight, and whether its columns are in order."""
        bits = base.bits
        require(bits in (4, 8), f"it has {bits} bits, and the kernels read 4 and 8")
        require(not getattr(base, "planar", False), "its codes lie by planes of bits")
        found = super().facts(base)
        (N, K), order = found.shape, base.g_idx
        require(K % (32 // bits) == 0, f"its {K} columns are not whole words")
        require(tuple(base.qweight.shape) == (K * bits // 32, N), f"its codes are {tuple(base.qweight.shape)}")
        require(order.dtype == torch.int32 and tuple(order.shape) == (K,) and order.is_contiguous(), "its g_idx is odd")
        copies: tuple[Tensor, ...] = ()
        if torch.equal(order, torch.arange(K, dtype=torch.int32, device=order.device) // found.blocksize):
            copies = (nothing(order, torch.int32),)
        note = f"GPTQ, {bits} bits" + ("" if copies else ", act-order")
        return found._replace(format=f"gptq{bits}", copies=copies, note=note)


class Awq(_Packed):
    """Reads an AwqTorchLinear of gptqmodel."""

    kind = "AwqTorchLinear"

    def facts(self, base: Any) -> Facts:
        """Return the format of the weight."""
        require(base.bits == 4, f"it has {base.bits} bits, and the kernels read 4")
        found = super().facts(base)
        N, K = found.shape
        require(tuple(base.qweight.shape) == (K, N // 8), f"its codes are {tuple(base.qweight.shape)}")
        return found._replace(format="awq4", copies=(nothing(base.qweight, torch.int32),), note="AWQ, 4 bits")


GPTQ = Gptq()
AWQ = Awq()
