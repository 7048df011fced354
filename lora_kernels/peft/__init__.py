"""PEFT's LoRA layers, computed by the fused kernels."""

from lora_kernels.peft.enabling import disable, enable, register
from lora_kernels.peft.fusing import FusedLinear, FuseReport, fuse, unfuse

__all__ = ["FuseReport", "FusedLinear", "disable", "enable", "fuse", "register", "unfuse"]
