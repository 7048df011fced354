"""LoRA at the cost of the frozen layer.

    y = x Wᵀ + bias + (α/r) · (dropout(x) Aᵀ) Bᵀ

in one call, forward and backward.
"""

from lora_kernels.module import FusedLoRALinear
from lora_kernels.ops import explain, lora_linear

__all__ = ["FusedLoRALinear", "explain", "lora_linear"]
__version__ = "0.1.0"
