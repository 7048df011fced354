"""LoRA at the cost of the frozen layer.

    y = x Wᵀ + bias + (α/r) · (dropout(x) Aᵀ) Bᵀ

in one call, forward and backward.
"""

from typing import TYPE_CHECKING, Any

from lora_kernels.module import FusedLoRALinear
from lora_kernels.ops import explain, lora_linear

if TYPE_CHECKING:
    from lora_kernels.peft import FuseReport, disable, enable, fuse, unfuse

__all__ = ["FuseReport", "FusedLoRALinear", "disable", "enable", "explain", "fuse", "lora_linear", "unfuse"]
__version__ = "0.1.0"

_FROM_PEFT = ("FuseReport", "disable", "enable", "fuse", "unfuse")


def __getattr__(name: str) -> Any:
    """What needs PEFT imports it where it is first asked for."""
    if name in _FROM_PEFT:
        from lora_kernels import peft

        return getattr(peft, name)
    raise AttributeError(f"module 'lora_kernels' has no attribute {name!r}")
