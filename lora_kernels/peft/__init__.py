"""PEFT's LoRA layers, computed by the fused kernels."""

from lora_kernels.peft.fusing import FusedLinear, FuseReport, disable, enable, fuse, unfuse

__all__ = ["FuseReport", "FusedLinear", "disable", "enable", "fuse", "unfuse"]
