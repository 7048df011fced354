"""Frozen weights in 4 or 8 bits, in the formats of bitsandbytes and in fp8."""

from lora_kernels.quant.bnb import from_bnb
from lora_kernels.quant.weight import FORMATS, Nested, QuantizedWeight, dequantize_weight, quantize_weight

__all__ = ["FORMATS", "Nested", "QuantizedWeight", "dequantize_weight", "from_bnb", "quantize_weight"]
