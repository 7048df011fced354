"""The modules: fused LoRA layers, the first values of their adapters, and the plans for tensor parallelism.

Both kinds of layer are imported here, so that `FusedLoRALinear` finds `QuantizedLoRALinear` whichever of their files is
imported first.
"""

from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.quantized import QuantizedLoRALinear

__all__ = ["FusedLoRALinear", "QuantizedLoRALinear"]
